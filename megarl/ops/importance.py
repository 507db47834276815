"""Weights and rejection where the engine's probabilities are not the trainer's, by their ratio: no gradient.

The ratio of a token is r = policy_old / engine; log-ratios are in nats, 0 at masked tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megarl.ops.segments import sum_by_sequence

RatioLevel = Literal["token", "sequence"]
BoundMode = Literal["truncate", "mask"]
RejectionLevel = Literal["token", "sequence", "sequence_mean", "sequence_any"]


@dataclass(frozen=True)
class ImportanceWeights:
    """The weight of each token, and where a bound changed it."""

    values_T: Tensor
    bounded_T: Tensor
    """[T] bool."""


def importance_weights(
    log_ratio_T: Tensor,
    sequence_T: Tensor,
    num_sequences: int,
    level: RatioLevel,
    mode: BoundMode,
    floor: float | None,
    cap: float,
) -> ImportanceWeights:
    """Bounded importance weights, [T].

    An overflow of exp is infinite and so beyond `cap`.

    Args:
        log_ratio_T: [T] log r.
        sequence_T: [T] int64, the token's sequence.
        num_sequences: S.
        level: token: r of each token; sequence: the product of the sequence's r, for each of its tokens.
        mode: truncate: the weight beyond a bound is the bound; mask: it is 0 (at token level with both bounds: IcePop).
        floor: lower bound; None for none.
        cap: upper bound.
    """
    log_ratio_T = log_ratio_T.detach()
    if level == "sequence":
        log_ratio_T = sum_by_sequence(log_ratio_T, sequence_T, num_sequences)[sequence_T]
    ratio_T = log_ratio_T.exp()
    bounded_T = ratio_T > cap
    if floor is not None:
        bounded_T = bounded_T | (ratio_T < floor)
    if mode == "truncate":
        return ImportanceWeights(ratio_T.clamp(min=floor, max=cap), bounded_T)
    return ImportanceWeights(torch.where(bounded_T, 0.0, ratio_T), bounded_T)


def rejected_tokens(
    log_ratio_T: Tensor, sequence_T: Tensor, lengths_S: Tensor, level: RejectionLevel, low: float, high: float
) -> Tensor:
    """[T] bool, the tokens whose ratio lies outside low..high, or that of their sequence.

    Args:
        log_ratio_T: [T] log r.
        sequence_T: [T] int64, the token's sequence.
        lengths_S: [S] counted tokens of each sequence; 0 allowed where nothing counts.
        level: token: r of each token; sequence: the product of the sequence's r; sequence_mean: its geometric mean;
            sequence_any: r of any of its tokens.
        low: lower bound, above 0.
        high: upper bound.
    """
    log_ratio_T = log_ratio_T.detach()
    if level in ("sequence", "sequence_mean"):
        sums_S = sum_by_sequence(log_ratio_T, sequence_T, len(lengths_S))
        log_ratio_T = (sums_S / lengths_S.clamp(min=1.0) if level == "sequence_mean" else sums_S)[sequence_T]
    outside_T = (log_ratio_T < math.log(low)) | (log_ratio_T > math.log(high))
    if level == "sequence_any":
        return sum_by_sequence(outside_T.to(lengths_S.dtype), sequence_T, len(lengths_S))[sequence_T] > 0
    return outside_T
