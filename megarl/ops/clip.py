"""The clipped surrogate objective."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ClippedObjective:
    """Per-token objective (to be maximised) and where a clip took its gradient away."""

    values_T: Tensor
    clipped_T: Tensor
    """[T] bool: ratio above 1 + high with a positive advantage, or below 1 - low with a negative one."""
    dual_clipped_T: Tensor
    """[T] bool: ratio above the dual clip with a negative advantage; all False without one."""


def clipped_objective(
    ratio_T: Tensor, advantages_T: Tensor, low: float, high: float, dual: float | None
) -> ClippedObjective:
    """min(r A, clip(r, 1 - low, 1 + high) A) (PPO, 1707.06347 Eq. 7), for A < 0 at least dual x A (1912.09729).

    Written as A times a bounded ratio, which is the same function: for A >= 0 the ratio counts up to 1 + high, for
    A < 0 from 1 - low up to `dual`. On a bound itself the gradient is that of the inside. Shapes [T].
    """
    negative_T = advantages_T < 0
    bounded_T = torch.where(negative_T, ratio_T.clamp(min=1.0 - low, max=dual), ratio_T.clamp(max=1.0 + high))
    too_high_T = (advantages_T > 0) & (ratio_T > 1.0 + high)
    too_low_T = negative_T & (ratio_T < 1.0 - low)
    dual_clipped_T = torch.zeros_like(negative_T) if dual is None else negative_T & (ratio_T > dual)
    return ClippedObjective(bounded_T * advantages_T, too_high_T | too_low_T, dual_clipped_T)
