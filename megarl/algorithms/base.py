"""What an algorithm is to the training loop.

The loop provides what `needs` asks for, in this order per step:

    rollouts -> keep (on the rewards as scored) -> shape_rewards -> advantages (on the shaped rewards)
             -> old / reference log-probs -> loss per micro-batch

The first line works on whole groups from metadata that every rank has, so every rank computes the same and no
algorithm contains parallel code. `loss` sees the flat tokens of one shard; counts over all ranks are passed in.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from megarl.config.algorithms import AlgorithmSettings
from megarl.errors import Refusal
from megarl.ops.segments import LocalReducer, Reducer


@dataclass(frozen=True)
class Needs:
    """What the loop must provide for an algorithm."""

    rollouts: bool
    """Sampled groups; without them the data set's worked solutions are the sequences."""
    old_log_probs: bool
    """Log-probs under the weights the rollouts were made with, recomputed by the policy."""
    reference_log_probs: bool
    """Log-probs under the reference weights."""
    entropy_gradient: bool
    """`entropy_T` must carry a gradient; otherwise it may be computed without."""
    max_generation_batches: int = 1
    """Bound on generation batches per step while `keep` drops groups; then the step trains on what it has."""


@dataclass(frozen=True)
class AlgorithmContext:
    """Facts of the run that an algorithm may need."""

    max_tokens: int
    """rollout.max_tokens: longest response in tokens."""
    group_size: int = 1
    """rollout.group_size: samples per prompt."""


@dataclass(frozen=True)
class GroupOutcome:
    """How the samples of one prompt ended: metadata, the same on all ranks; one entry per sample, in sample order.

    Raises:
        Refusal: the entries differ in number, there are none, or a reward is not finite.
    """

    rewards: tuple[float, ...]
    lengths: tuple[int, ...]
    """Response tokens, the end token included."""
    finished: tuple[bool, ...]
    """False where the response was cut at rollout.max_tokens."""

    def __post_init__(self) -> None:
        counts = {len(self.rewards), len(self.lengths), len(self.finished)}
        if len(counts) != 1 or 0 in counts:
            raise Refusal(
                f"a group with {len(self.rewards)} rewards, {len(self.lengths)} lengths, {len(self.finished)} ends",
                "needs the same number of each, at least 1",
                "pass one entry per sample",
            )
        for index, reward in enumerate(self.rewards):
            if not math.isfinite(reward):
                raise Refusal(f"reward {reward} of sample {index}", "must be finite", "correct the reward function")


@dataclass(frozen=True)
class BatchTotals:
    """Counts of the whole mini-batch, over all ranks and micro-batches."""

    tokens: float
    """Response tokens that count (mask 1)."""
    sequences: float


@dataclass(frozen=True)
class LossInputs:
    """The flat tokens of one micro-batch of one shard; fields that the algorithm does not need may be None.

    Log-probs and entropies are in nats, float32 or wider. Masked tokens may hold anything, NaN included.
    """

    log_probs_T: Tensor
    """[T] of the current weights, with gradient."""
    entropy_T: Tensor
    """[T] entropy of the policy at each token; with gradient where `Needs.entropy_gradient` asks."""
    mask_T: Tensor
    """[T] 1 on response tokens that count, else 0."""
    sequence_T: Tensor
    """[T] int64, index of the token's sequence in the micro-batch, in 0..S-1 at masked tokens too."""
    num_sequences: int
    lengths_S: Tensor
    """[S] float, counted tokens of each whole sequence, over all shards that hold a part of it."""
    totals: BatchTotals
    old_log_probs_T: Tensor | None = None
    """[T], a constant. While the weights are still those of the rollouts this may be `log_probs_T` itself."""
    rollout_log_probs_T: Tensor | None = None
    """[T] the engine's log-probs under its sampling distribution."""
    reference_log_probs_T: Tensor | None = None
    """[T]"""
    advantages_T: Tensor | None = None
    """[T]"""
    reducer: Reducer = field(default_factory=LocalReducer)


@dataclass(frozen=True)
class LossTerms:
    """A micro-batch's share of the mini-batch's loss, and what to log."""

    loss: Tensor
    """Scalar; the sum over all micro-batches and ranks is the mini-batch's loss, nothing is left to divide."""
    token_sums: dict[str, Tensor]
    """Scalars (float64) without gradient, sums over this shard's counted tokens; the loop adds them up over all
    micro-batches and ranks, divides by `BatchTotals.tokens` and logs them under these names."""


class Algorithm(ABC):
    """One algorithm: a file beside this one and a row in `megarl.algorithms.ALGORITHMS`."""

    Settings: ClassVar[type[AlgorithmSettings]]
    needs: Needs

    @abstractmethod
    def __init__(self, settings: Any, context: AlgorithmContext) -> None:
        """Set `needs`.

        Args:
            settings: an instance of the class's `Settings`.
            context: facts of the run.

        Raises:
            Refusal: settings that do not fit each other or the run.
        """

    def shape_rewards(self, outcome: GroupOutcome) -> tuple[float, ...]:
        """The rewards that `advantages` shall see, one per sample; by default those of the outcome."""
        return outcome.rewards

    def keep(self, outcome: GroupOutcome) -> bool:
        """Whether to train on the group, by its rewards as scored (not shaped); False drops it. Default: keep."""
        return True

    def advantages(self, outcome: GroupOutcome) -> tuple[float, ...]:
        """One advantage per sample, for all its tokens; `outcome` is the whole group with shaped rewards.

        By default the rewards themselves.
        """
        return outcome.rewards

    @abstractmethod
    def loss(self, inputs: LossInputs) -> LossTerms:
        """The micro-batch's share of the loss; no collective but those of `inputs.reducer`."""


def required(values_T: Tensor | None, name: str) -> Tensor:
    """`values_T`, which the algorithm declared in its `needs`.

    Raises:
        ValueError: the loop did not provide it.
    """
    if values_T is None:
        raise ValueError(f"LossInputs.{name} is None, but the algorithm needs it")
    return values_T
