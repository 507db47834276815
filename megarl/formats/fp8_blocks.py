"""Weights that a checkpoint stores as FP8 with a scale for every block, read as the numbers that they stand for.

The format is that of `megarl.config.quantisation`. Scales may be any positive numbers: those of published checkpoints
are not all powers of two.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from megarl.config.quantisation import BLOCK, blocks
from megarl.errors import Refusal
from megarl.reshard.boxes import Box


def read_dequantised(
    name: str, scales: str, box: Box, read: Callable[[str, Box], torch.Tensor], origin: Path
) -> torch.Tensor:
    """A box of a quantised weight, which need not begin or end with a block: fp32, value x scale.

    Raises `Refusal` where one of its scales is NaN, infinite, 0 or negative.
    """
    boxes = tuple((start // BLOCK, blocks(stop)) for start, stop in box)
    numbers = read(scales, boxes).float()
    bad = int((~(numbers.isfinite() & (numbers > 0))).sum())
    if bad:
        raise Refusal(
            f"{scales} in {origin}",
            f"must be positive numbers, but {bad} of {numbers.numel()} are not",
            "copy the checkpoint again, or use the one that it was made from",
        )
    rows, columns = (
        torch.arange(start, stop) // BLOCK - first for (start, stop), (first, _) in zip(box, boxes, strict=True)
    )
    return read(name, box).float() * numbers[rows][:, columns]
