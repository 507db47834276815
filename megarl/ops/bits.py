"""Sums over the bits of tensors: the same for the same numbers in any order and in any pieces."""

from __future__ import annotations

import torch

#: Elements that are added up at a time, since each is widened first.
SUMMED_ELEMENTS = 1 << 20


def sum_of_bits(tensor: torch.Tensor) -> int:
    """The sum of the elements' bits, read as whole numbers with a sign."""
    kind = {1: torch.int8, 2: torch.int16, 4: torch.int32}[tensor.element_size()]
    rows = max(1, SUMMED_ELEMENTS * len(tensor) // max(1, tensor.numel()))
    return sum(int(part.view(kind).sum(dtype=torch.int64)) for part in tensor.split(rows))
