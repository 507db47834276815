"""Context parallelism: which tokens of a sequence each rank computes, and how their values come together again.

A sequence is cut into 2 x context pieces of equal length; rank r computes pieces r and 2 x context - 1 - r, so that
under a causal mask all ranks have the same work. This is Megatron's and Transformer Engine's convention.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.autograd import Function


def held_positions(lengths: Sequence[int], context: int, rank: int) -> np.ndarray:
    """Flat positions that `rank` computes of sequences that stand end to end, in the order it computes them, int64.

    `lengths` in tokens, each a multiple of 2 x `context` where `context` is not 1.

    >>> held_positions([8, 4], 2, 0).tolist()
    [0, 1, 6, 7, 8, 11]
    """
    ends = np.cumsum(lengths)
    if context == 1:
        return np.arange(ends[-1] if len(ends) else 0)
    parts: list[np.ndarray] = []
    for end, length in zip(ends.tolist(), lengths, strict=True):
        piece = length // (2 * context)
        for number in (rank, 2 * context - 1 - rank):
            start = end - length + number * piece
            parts.append(np.arange(start, start + piece))
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def whole_sequences(values: torch.Tensor, parts: Sequence[torch.Tensor], group: dist.ProcessGroup) -> torch.Tensor:
    """Values of all tokens, (T,), on every rank of `group`, from each rank's own.

    `parts[r]` int64: places in 0..T-1 of rank r's values, in its order. Every rank goes on to compute the same from the
    whole, so that its gradient of the whole is the gradient of all of them together: backward, each takes its part.
    """
    if not any(len(part) for part in parts):
        return values
    return _WholeSequences.apply(values, tuple(parts), group)


class _WholeSequences(Function):
    @staticmethod
    def forward(
        ctx: Any, values: torch.Tensor, parts: tuple[torch.Tensor, ...], group: dist.ProcessGroup
    ) -> torch.Tensor:
        ctx.part = parts[dist.get_rank(group)]
        longest = max(len(part) for part in parts)
        padded = values.new_zeros(longest)
        padded[: len(values)] = values
        gathered = [torch.empty_like(padded) for _ in parts]
        dist.all_gather(gathered, padded, group=group)
        whole = values.new_empty(sum(len(part) for part in parts))
        for part, found in zip(parts, gathered, strict=True):
            whole[part] = found[: len(part)]
        return whole

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0][ctx.part], None, None
