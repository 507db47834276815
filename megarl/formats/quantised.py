"""Weights that a checkpoint stores as FP8 with a scale for every block, read as the numbers that they stand for.

The format is that of `megarl.config.quantisation`. Scales may be any positive numbers: those of published checkpoints
are not all powers of two.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from megarl.config.quantisation import BLOCK
from megarl.errors import Refusal
from megarl.reshard.boxes import Box


def check_scales(name: str, scales: torch.Tensor, origin: Path) -> None:
    """Raise `Refusal` where one is NaN, infinite, 0 or negative."""
    numbers = scales.float()
    bad = int((~(numbers.isfinite() & (numbers > 0))).sum())
    if bad:
        raise Refusal(
            f"{name} in {origin}",
            f"must be positive numbers, but {bad} of its {scales.numel()} are not",
            "copy the checkpoint again, or use the one that it was made from",
        )


def read_dequantised(name: str, scales: str, box: Box, read: Callable[[str, Box], torch.Tensor]) -> torch.Tensor:
    """A box of a quantised weight, which need not begin or end with a block: fp32, value x scale."""
    blocks = tuple((start // BLOCK, -(-stop // BLOCK)) for start, stop in box)
    rows, columns = (
        torch.arange(start, stop) // BLOCK - first for (start, stop), (first, _) in zip(box, blocks, strict=True)
    )
    return read(name, box).float() * read(scales, blocks).float()[rows][:, columns]
