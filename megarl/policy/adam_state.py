"""Adam's state in checkpoints where neither Apex nor Transformer Engine is there, and the optimizer is PyTorch's.

PyTorch's Adam counts steps per parameter and makes its state at the first step. Megatron's distributed optimizer
expects the state before loading and stumbles over the counters, so both are arranged for here.
"""

from __future__ import annotations

from typing import Any

import torch


def allocate(optimizer: Any) -> None:
    """Give parameters that were never updated the state that their first step would start from."""
    for adam in _adams(optimizer):
        for parameter in _parameters(adam):
            if not adam.state[parameter]:
                adam.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def load(optimizer: Any, state: Any, updates: int) -> None:
    """Load what `optimizer.sharded_state_dict` saved; `optimizer` is Megatron's chain of distributed optimizers.

    `updates` is the number of updates they had made. Of PyTorch's only the moments and fp32 weights are loaded: how
    many there are in the chain depends on the layout (experts have their own), so the saved rest need not fit.
    """
    adams = _adams(optimizer)
    if not adams:
        optimizer.load_state_dict(state)
        return
    chained = optimizer.chained_optimizers
    states = [state] if len(chained) == 1 else [state[index] for index in range(len(chained))]
    for distributed, adam, part in zip(chained, adams, states, strict=True):
        # Megatron looks for every entry of a parameter's state among the loaded tensors, where counters are not.
        for parameter in _parameters(adam):
            del adam.state[parameter]["step"]
        distributed.load_parameter_state_from_fully_reshardable(part["param_state"])
        for parameter in _parameters(adam):
            adam.state[parameter]["step"] = torch.tensor(float(updates))


def _adams(optimizer: Any) -> list[Any]:
    """PyTorch's optimizer inside each of the chained ones; empty where they are fused ones."""
    inner = [distributed.optimizer for distributed in optimizer.chained_optimizers]
    return inner if all(isinstance(one, torch.optim.Adam | torch.optim.AdamW) for one in inner) else []


def _parameters(adam: Any) -> list[torch.Tensor]:
    return [parameter for group in adam.param_groups for parameter in group["params"]]
