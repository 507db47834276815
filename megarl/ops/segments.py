"""Sums over the sequences of a flat micro-batch."""

from __future__ import annotations

from torch import Tensor


def sum_by_sequence(values_T: Tensor, sequence_T: Tensor, num_sequences: int) -> Tensor:
    """Sums [S] of `values_T` (float, [T]) by `sequence_T` (int64, [T], in 0..S-1); 0 for a sequence without tokens."""
    return values_T.new_zeros(num_sequences).index_add(0, sequence_T, values_T)
