"""Boxes applied to torch tensors: the one place of this package that touches data."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megarl.errors import Refusal
from megarl.reshard.boxes import Box, LocalTensor, extents

#: Reads a box of a checkpoint tensor: (checkpoint name, box) -> tensor of the box's extents.
Reader = Callable[[str, Box], torch.Tensor]


def box_view(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    """The box of `tensor`, as a view of the same number of dimensions."""
    return tensor[tuple(slice(start, stop) for start, stop in box)]


def copy_box(target: torch.Tensor, target_box: Box, source: torch.Tensor, source_box: Box) -> None:
    """Copy a box of `source` into a box of `target`, converting type and device where they differ.

    The boxes have the same extents, leading dimensions of extent 1 aside; raises `ValueError` otherwise.
    """
    wanted, given = extents(target_box), extents(source_box)
    shorter = min(len(wanted), len(given))
    if wanted[-shorter:] != given[-shorter:] or set(wanted[:-shorter] + given[:-shorter]) - {1}:
        raise ValueError(f"boxes of extents {given} and {wanted} cannot be copied")
    box_view(target, target_box).copy_(box_view(source, source_box).reshape(wanted))


def read_local(tensor: LocalTensor, reader: Reader, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Make a rank's tensor from a checkpoint, reading only the boxes it needs; padding is zero.

    `dtype` defaults to that of what is read (torch's default where the tensor is all padding).
    Raises `Refusal` where the reader returns another shape than asked for: the checkpoint's tensor
    is smaller than the model's.
    """
    local: torch.Tensor | None = None
    for region in tensor.regions:
        data = reader(region.hf_name, region.hf_box)
        if tuple(data.shape) != extents(region.hf_box):
            raise Refusal(
                f"{region.hf_name} in the checkpoint",
                f"must contain the box {region.hf_box}, but reading it gave shape {tuple(data.shape)}",
                "use the config.json that belongs to these weights",
            )
        if extents(region.local_box) == tensor.shape:
            return data.reshape(tensor.shape).to(dtype or data.dtype)
        if local is None:
            local = torch.zeros(tensor.shape, dtype=dtype or data.dtype)
        target = box_view(local, region.local_box)
        target.copy_(data.reshape(target.shape))
    return torch.zeros(tensor.shape, dtype=dtype) if local is None else local
