"""Whether a policy still is one: the weights that train, the optimizers' moments and the log-probs are numbers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from megarl.config.parameter_sets import POLICY
from megarl.parallel.exchange import gather_all
from megarl.policy.digest import MOMENTS, WEIGHTS
from megarl.policy.policy import Policy
from megarl.policy.trained_set import TrainedSet
from megarl.records import Sequence


def what_is_not(policy: Policy, probe: Sequence) -> str | None:
    """The first of weights, moments and log-probs that holds NaN or infinity, in words; None where all are finite.

    All sets that train are looked at, the policy's own first.

    `probe` is a sequence with two tokens or more, the same on all ranks, that the log-probs are of: weights may be
    finite and too large to compute with. Collective, with the same answer on all ranks.
    """
    found: str | None = None
    for name, trained in policy.trained.items():
        policy.bring(name)
        words = _not_finite(trained, policy, name, probe)
        if words is not None:
            found = words if name == POLICY else f"of the parameter set {name} {words}"
            break
    policy.bring(POLICY)
    return found


def _not_finite(trained: TrainedSet, policy: Policy, set_name: str, probe: Sequence) -> str | None:
    largest = {name: _largest(parameter) for name, parameter in trained.named_parameters()}
    found = gather_all(next((f"the weights {name}" for name, size in largest.items() if not np.isfinite(size)), None))
    # Before the first update the optimizer has no state.
    if trained.scheduler.num_steps:
        found += gather_all(next(_moments(trained), None))
    if (first := next((words for words in found if words is not None), None)) is not None:
        return f"{first} are not finite"
    log_probs = policy.measure([probe], set_name)
    if all(gather_all(log_probs is None or all(np.isfinite(values).all() for values in log_probs))):
        return None
    size, name = max(gather_all(max(((size, name) for name, size in largest.items()), default=(0.0, ""))))
    return f"the log-probs are not finite, though the weights are; the largest is {size:.2g}, in {name}"


def _moments(trained: TrainedSet) -> Iterator[str]:
    """Moments on this rank that are not finite, in words."""
    names = {parameter: name for name, parameter in trained.named_parameters()}
    for distributed in trained.optimizer.chained_optimizers:
        for parameter in distributed.model_param_group_index_map:
            state = distributed._get_main_param_and_optimizer_states(parameter)
            for kind in (WEIGHTS, *MOMENTS):
                if kind in state and not np.isfinite(_largest(state[kind])):
                    what = "fp32 weights" if kind == WEIGHTS else kind
                    yield f"the optimizer's {what} of {names[parameter]}"


def _largest(values: torch.Tensor) -> float:
    """The greatest magnitude, which is NaN where one of the values is."""
    return (
        float(torch.linalg.vector_norm(values.detach(), float("inf"), dtype=torch.float32)) if values.numel() else 0.0
    )
