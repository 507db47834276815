"""Sums over the sequences of a flat micro-batch."""

from __future__ import annotations

import torch
from torch import Tensor


def sum_by_sequence(values_T: Tensor, sequence_T: Tensor, num_sequences: int) -> Tensor:
    """Sums [S] of `values_T` (float, [T]) by `sequence_T` (int64, [T], in 0..S-1); 0 for a sequence without tokens."""
    return values_T.new_zeros(num_sequences).index_add(0, sequence_T, values_T)


def discounted_sums(values_T: Tensor, sequence_T: Tensor, discount: float) -> Tensor:
    """At each token the sum over itself and those after it in its sequence, `discount`**k times that k tokens on. [T].

    A sequence's tokens stand together, in order; `sequence_T` as above.
    """
    reach, sums_T = 1, values_T
    while discount > 0 and reach < len(sums_T):
        # Each token has the sum over `reach` tokens, and takes on that of the next `reach`.
        same_T = sequence_T[:-reach] == sequence_T[reach:]
        later_T = torch.where(same_T, sums_T[reach:], 0.0) * discount**reach
        sums_T = torch.cat([sums_T[:-reach] + later_T, sums_T[-reach:]])
        reach *= 2
    return sums_T
