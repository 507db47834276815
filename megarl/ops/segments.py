"""Sums over the sequences of a flat micro-batch."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Reducer(Protocol):
    """How a loss sums token values over whole sequences when a shard may hold only part of each.

    Implementations must be differentiable: the gradient of a token's value is the gradient of its sequence's
    sum, added up over every shard that holds a part of the sequence, because each of these shards uses the sum.
    """

    def sum_by_sequence(self, values_T: Tensor, sequence_T: Tensor, num_sequences: int) -> Tensor:
        """Sums [S] of `values_T` (float, [T]) by `sequence_T` (int64, [T], in 0..S-1) over all shards."""
        ...


class LocalReducer:
    """The reducer of a shard that holds its sequences whole."""

    def sum_by_sequence(self, values_T: Tensor, sequence_T: Tensor, num_sequences: int) -> Tensor:
        """See `Reducer.sum_by_sequence`; a sequence without tokens here sums to 0."""
        return values_T.new_zeros(num_sequences).index_add(0, sequence_T, values_T)
