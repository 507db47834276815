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


def load(optimizer: Any, state: Any) -> None:
    """Load what `optimizer.sharded_state_dict` saved; `optimizer` is Megatron's chain of distributed optimizers."""
    adams = _adams(optimizer)
    if not adams:
        optimizer.load_state_dict(state)
        return
    chained = optimizer.chained_optimizers
    states = [state] if len(chained) == 1 else [state[index] for index in range(len(chained))]
    for distributed, adam, part in zip(chained, adams, states, strict=True):
        distributed.load_state_dict({key: value for key, value in part.items() if key != "param_state"})
        # Megatron looks for every entry of a parameter's state among the loaded tensors, where counters are not. It
        # also gives all parameters one counter, which each of them would advance at every step.
        counters = {parameter: adam.state[parameter].pop("step") for parameter in _parameters(adam)}
        distributed.load_parameter_state_from_fully_reshardable(part["param_state"])
        for parameter, counter in counters.items():
            adam.state[parameter]["step"] = counter.clone()


def _adams(optimizer: Any) -> list[Any]:
    """PyTorch's optimizer inside each of the chained ones; empty where they are fused ones."""
    inner = [distributed.optimizer for distributed in optimizer.chained_optimizers]
    return inner if all(isinstance(one, torch.optim.Adam | torch.optim.AdamW) for one in inner) else []


def _parameters(adam: Any) -> list[torch.Tensor]:
    return [parameter for group in adam.param_groups for parameter in group["params"]]
