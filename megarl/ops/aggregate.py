"""From token losses to the mini-batch's loss: one weight per token.

The counts are those of the whole mini-batch over all ranks and micro-batches, so that the weighted sums of all
micro-batches add up to the loss of the whole, whichever way the sequences are spread.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Aggregation = Literal["token_mean", "sequence_mean", "constant", "token_sum"]


def token_weights(
    kind: Aggregation,
    counted_T: Tensor,
    sequence_T: Tensor,
    lengths_S: Tensor,
    total_tokens: float,
    total_sequences: float,
    constant: float,
) -> Tensor:
    """The weight of each token in the loss, [T] in `lengths_S`'s type; exactly 0 at masked tokens.

    Args:
        kind: token_mean: 1 / total_tokens (DAPO, 2503.14476 Eq. 8); sequence_mean: 1 / (length x total_sequences)
            (GRPO, 2402.03300 Eq. 3); constant: 1 / (total_sequences x constant) (Dr. GRPO, 2503.20783); token_sum: 1.
        counted_T: [T] bool.
        sequence_T: [T] int64, the token's sequence, valid at masked tokens too.
        lengths_S: [S] float, counted tokens of each sequence.
        total_tokens: counted tokens of the mini-batch.
        total_sequences: sequences of the mini-batch.
        constant: divisor of kind constant, in tokens.
    """
    if kind == "token_mean":
        divisor_S = torch.full_like(lengths_S, total_tokens)
    elif kind == "sequence_mean":
        divisor_S = lengths_S * total_sequences
    elif kind == "constant":
        divisor_S = torch.full_like(lengths_S, total_sequences * constant)
    else:
        divisor_S = torch.ones_like(lengths_S)
    # Where nothing counts the divisor may be 0; the weight 1/0 is then never taken. A counted token whose count was
    # forgotten takes it, and the loss shows it.
    return torch.where(counted_T, divisor_S.reciprocal()[sequence_T], 0.0)
