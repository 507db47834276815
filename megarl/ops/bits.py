"""Numbers that stand for the bits of tensors: sums that any cut leaves the same, and digests that a swap changes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import xxhash

#: Elements that are added up at a time, since each is widened first.
SUMMED_ELEMENTS = 1 << 20

#: Elements that are digested at a time where they do not lie in one piece: few enough for a core's cache.
_CACHED_ELEMENTS = 1 << 16

#: A digest: a number on the CPU; on a GPU a tensor () int64, so that nothing waits for it.
Digest = int | torch.Tensor


def sum_of_bits(tensor: torch.Tensor) -> int:
    """The sum of the elements' bits, read as whole numbers with a sign: the same in any order and in any pieces."""
    kind = _whole_numbers_of(tensor)
    rows = max(1, SUMMED_ELEMENTS * len(tensor) // max(1, tensor.numel()))
    return sum(int(part.view(kind).sum(dtype=torch.int64)) for part in tensor.split(rows))


def digest(tensor: torch.Tensor) -> Digest:
    """64 bits of all elements' bits in row-major order, wherever these lie; equal on devices of one kind.

    On the CPU XXH3, which reads faster than memory delivers; elsewhere `weighted_sum`, in which a wrong element and two
    that changed places both show.
    """
    if tensor.device.type != "cpu":
        return weighted_sum(tensor)
    if tensor.is_contiguous():
        return xxhash.xxh3_64_intdigest(_bytes(tensor))
    found = xxhash.xxh3_64()
    for part in _in_rows(tensor, _CACHED_ELEMENTS):
        found.update(_bytes(part.contiguous()))
    return found.intdigest()


def weighted_sum(tensor: torch.Tensor) -> torch.Tensor:
    """() int64: the sum of the elements' bits, read as whole numbers with a sign, each times 2 i + 1 for element i."""
    total, first = torch.zeros((), dtype=torch.int64, device=tensor.device), 0
    for part in _in_rows(tensor, 4 * SUMMED_ELEMENTS):
        factors = torch.arange(first, first + part.numel(), dtype=torch.int64, device=tensor.device).mul_(2).add_(1)
        total += factors.mul_(part.contiguous().view(_whole_numbers_of(tensor)).view(-1)).sum()
        first += part.numel()
    return total


def as_numbers(digests: Sequence[Digest]) -> np.ndarray:
    """Digests as uint64 (n,), waited for together."""
    if digests and isinstance(digests[0], torch.Tensor):
        return torch.stack([one for one in digests if isinstance(one, torch.Tensor)]).cpu().numpy().view(np.uint64)
    return np.array(digests, np.uint64)


def _in_rows(tensor: torch.Tensor, elements: int) -> Sequence[torch.Tensor]:
    """Parts of about so many elements, cut along the first dimension that has more than one row."""
    while tensor.dim() > 1 and len(tensor) == 1:
        tensor = tensor[0]
    if tensor.numel() <= elements or tensor.dim() == 0:
        return [tensor]
    return tensor.split(max(1, elements * len(tensor) // tensor.numel()))


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data


def _whole_numbers_of(tensor: torch.Tensor) -> torch.dtype:
    return {1: torch.int8, 2: torch.int16, 4: torch.int32}[tensor.element_size()]
