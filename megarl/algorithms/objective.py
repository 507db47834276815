"""The losses of an algorithm: pure functions of the flat tokens of one micro-batch.

A loss sees whole sequences under every layout, and the counts of the whole mini-batch are passed in: no collective.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class BatchTotals:
    """Counts of the whole mini-batch, over all data-parallel replicas and micro-batches.

    A sequence is a sampled answer, or a target: a text whose likelihood is to rise, with no reward of its own.
    Supervised training, which has solutions alone, counts them as answers.
    """

    tokens: float
    """Tokens of the sampled answers that count (mask 1)."""
    sequences: float
    """Sampled answers that have such tokens."""
    response_tokens: float = 0.0
    """All response tokens of the groups' samples, trained or not."""
    target_tokens: float = 0.0
    target_sequences: float = 0.0


@dataclass(frozen=True)
class LossInputs:
    """The flat tokens of one micro-batch of whole sequences; fields that the algorithm does not need may be None.

    Log-probs and entropies are in nats, float32 or wider. Masked tokens may hold anything, NaN included; so may the
    old and rollout log-probs and the advantages of targets.
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
    """[S] float, counted tokens of each sequence."""
    totals: BatchTotals
    old_log_probs_T: Tensor | None = None
    """[T], a constant. While the weights are still those of the rollouts this may be `log_probs_T` itself."""
    rollout_log_probs_T: Tensor | None = None
    """[T] the engine's log-probs under its sampling distribution."""
    reference_log_probs_T: Tensor | None = None
    """[T]"""
    advantages_T: Tensor | None = None
    """[T]"""
    signals_S: Mapping[str, Tensor] = field(default_factory=dict)
    """[S] each: what `Algorithm.signals` said of each sampled answer; 0 for targets."""
    target_S: Tensor | None = None
    """[S] bool, which sequences are targets; None: none."""
    group_S: Tensor | None = None
    """[S] int64, a number that sequences of the same group share."""


@dataclass(frozen=True)
class LossTerms:
    """A micro-batch's share of the mini-batch's loss, and what to log.

    What is logged are scalars (float64) without gradient; the loop adds them up over all micro-batches and
    replicas, divides, and logs them under their names. Every call of one algorithm's loss gives the same names.
    """

    loss: Tensor
    """Scalar; the sum over all micro-batches and replicas is the mini-batch's loss, nothing is left to divide."""
    token_sums: dict[str, Tensor] = field(default_factory=dict)
    """Sums over the counted tokens of sampled answers; divided by `BatchTotals.tokens`."""
    target_token_sums: dict[str, Tensor] = field(default_factory=dict)
    """Sums over the counted tokens of targets; divided by `BatchTotals.target_tokens`."""
    target_sums: dict[str, Tensor] = field(default_factory=dict)
    """Sums over the targets; divided by `BatchTotals.target_sequences`."""


def required(values: Tensor | None, name: str) -> Tensor:
    """`values`, which the algorithm declared in its `needs`.

    Raises:
        ValueError: the loop did not provide it.
    """
    if values is None:
        raise ValueError(f"LossInputs.{name} is None, but the algorithm needs it")
    return values
