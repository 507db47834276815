"""The reshard: where every piece of every weight lives in each layout, and the plan that moves it. Pure.

`table` maps names and layouts, `weight_map` cuts them into the local tensors of a rank, `plan` says
who sends what to whom, `copying` applies boxes to torch tensors. Only `copying` imports torch.
"""
