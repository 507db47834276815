"""The types in which tensors travel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

#: The type of a wire tensor; e4m3 is FP8.
Kind = Literal["fp32", "bf16", "e4m3"]

#: Bytes of an element.
BYTES: dict[Kind, int] = {"fp32": 4, "bf16": 2, "e4m3": 1}

#: The type in which a tensor of a layout travels, by its name there.
Wire = Callable[[str], Kind]


def all_in(kind: Kind) -> Wire:
    """Everything travels in one type."""
    return lambda name: kind
