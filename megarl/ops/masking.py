"""Masked tokens: whatever stands in them, NaN included, reaches neither a value nor a gradient."""

from __future__ import annotations

import torch
from torch import Tensor


def zero_masked(counted_T: Tensor, values_T: Tensor) -> Tensor:
    """`values_T` where `counted_T` (bool, [T]) holds, else 0 with zero gradient.

    A product with a 0/1 mask would not do: 0 x NaN is NaN, in the value and in the gradient.
    """
    return torch.where(counted_T, values_T, 0.0)


def sum_counted(counted_T: Tensor, values_T: Tensor) -> Tensor:
    """Sum of `values_T` (float or bool, [T]) over the counted tokens, for metrics: float64, no gradient."""
    return torch.where(counted_T, values_T.detach(), 0).sum(dtype=torch.float64)
