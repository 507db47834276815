"""Digests of the policy's weights and Adam's moments that do not depend on the layout, and what a save must show.

What a framework loses without a word is the optimizer's state when it resumes, and the update itself: training goes on,
only worse, or not at all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared

from megarl.errors import TrainingStopped
from megarl.ops.bits import sum_of_bits
from megarl.policy.model import copy_number, is_expert

#: Megatron's names of the optimizer's own weights, fp32 whatever the policy's precision, and of the moments.
WEIGHTS = "param"
MOMENTS = ("exp_avg", "exp_avg_sq")

_NONE = f"{0:016x}"


class Digest(NamedTuple):
    """Sums of bits over the whole model, in hexadecimal: of the optimizer's fp32 weights, and of each moment."""

    weights: str
    moments: dict[str, str]


def digest(optimizer: Any) -> Digest:
    """The same under every layout. Collective.

    `optimizer` is Megatron's chain of distributed optimizers. Copies that ranks share count once; padding of the
    vocabulary is zero and adds nothing.
    """
    kinds = (WEIGHTS, *MOMENTS)
    sums: Counter[str] = Counter()
    for distributed in optimizer.chained_optimizers:
        for parameter in distributed.model_param_group_index_map:
            if not _counts(parameter):
                continue
            state = distributed._get_main_param_and_optimizer_states(parameter)
            for kind in kinds:
                if kind in state:
                    sums[kind] += sum_of_bits(state[kind])
    weights, *moments = _over_ranks([sums[kind] for kind in kinds])
    return Digest(weights, dict(zip(MOMENTS, moments, strict=True)))


def of_frozen(parameters: Iterable[torch.nn.Parameter]) -> str:
    """The sum of bits of a model's weights that have no optimizer, the same under every layout. Collective."""
    first = {expert: copy_number(expert=expert) == 0 for expert in (False, True)}
    own = (one for one in parameters if first[is_expert(one)] and _counts(one))
    return _over_ranks([sum(sum_of_bits(one.detach()) for one in own)])[0]


def _counts(parameter: torch.nn.Parameter) -> bool:
    """Whether this rank counts a parameter, and not another of its tensor-parallel group or of the pipeline."""
    return param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(parameter)


def _over_ranks(sums: Sequence[int]) -> list[str]:
    """Sums of bits over all ranks, in hexadecimal. They wrap around in 64 bits, alike in any order. Collective."""
    total = torch.tensor([_wrapped(one) for one in sums], dtype=torch.int64)
    dist.all_reduce(total)
    return [f"{value & (1 << 64) - 1:016x}" for value in total.tolist()]


#: An update whose rate is below that part of the highest may leave fp32 weights as they are. Our choice.
_LEAST_RATE = 0.01


class Movement:
    """What has happened to the weights since they were last saved or loaded, or since the first update.

    `peak` is the schedule's highest learning rate.
    """

    def __init__(self, optimizer: Any, peak: float) -> None:
        self._optimizer, self._peak = optimizer, peak
        self._before: str | None = None
        self._since = "the start of the run"
        self._updates = 0
        self._stepped = False

    def update_begins(self, grad_norm: float, lr: float) -> None:
        """Count an update that is about to be applied: with a gradient, and a rate above the end of a decay's, it must
        move weights. Collective."""
        if self._before is None:
            self._before = digest(self._optimizer).weights
        self._stepped |= grad_norm > 0
        self._updates += grad_norm > 0 and lr > 0 and lr >= _LEAST_RATE * self._peak

    def check(self, found: Digest, name: str, of: str = "") -> None:
        """Raise `TrainingStopped` where a save under `name` would hold what no update has reached. `of`: " of the
        parameter set NAME", where it is not the policy's own."""
        if self._updates and found.weights == self._before:
            raise TrainingStopped(
                f"{name} was not saved: its weights{of} are bit for bit those of {self._since}, after {self._updates} "
                "update(s) that should have moved them; what was saved before is kept. Fix: raise optimizer.lr where "
                "it is too small for fp32 weights to move, else check that the installed megatron-core is the one that "
                "megarl names (megarl doctor)"
            )
        if self._stepped and not any(moment != _NONE for moment in found.moments.values()):
            raise TrainingStopped(
                f"{name} was not saved: all of Adam's moments{of} are zero after updates with a gradient, so a run "
                "that resumes from it would begin anew; what was saved before is kept. Fix: check that the installed "
                "megatron-core is the one that megarl names (megarl doctor)"
            )

    def begin_from(self, found: Digest, name: str) -> None:
        """Count anew from what was saved or loaded as `name`."""
        self._before, self._since, self._updates = found.weights, name, 0

    def forget(self) -> None:
        """Count anew: the weights were written from outside."""
        self._before, self._since, self._updates = None, "the start of the run", 0


def _wrapped(value: int) -> int:
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)
