"""Layouts: for every checkpoint tensor, which box of it lies where on which ranks.

A layout of thousands of ranks and tens of thousands of tensors stays small, because it is written by what repeats:
ranks that have the same box of a tensor are one `Place`, and tensors that are cut alike over the same ranks share one
`Split`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from megarl.reshard.boxes import Box, numel


@dataclass(frozen=True, slots=True)
class Place:
    """A box of a checkpoint tensor, the ranks that have it (ascending), and where it lies in their tensor.

    Both boxes have the same extents.
    """

    ranks: tuple[int, ...]
    hf_box: Box
    local_box: Box


@dataclass(frozen=True, eq=False)
class Split:
    """How a checkpoint tensor is cut over ranks. Shared by tensors that are cut alike, and compared by identity."""

    places: tuple[Place, ...]

    @cached_property
    def of_rank(self) -> dict[int, tuple[int, ...]]:
        """Numbers of the places that each rank has."""
        found: dict[int, list[int]] = {}
        for number, place in enumerate(self.places):
            for rank in place.ranks:
                found.setdefault(rank, []).append(number)
        return {rank: tuple(numbers) for rank, numbers in found.items()}

    @cached_property
    def most_elements(self) -> int:
        """Elements on the rank that has most of them."""
        sizes = [numel(place.hf_box) for place in self.places]
        return max(sum(sizes[number] for number in numbers) for numbers in self.of_rank.values())


@dataclass(frozen=True, slots=True)
class Spread:
    """A checkpoint tensor in a layout: `tensor` is its local name, the same on all ranks of `split`.

    `index`: its numbers along the leading dimensions of a stack of equal matrices, else empty.
    """

    tensor: str
    index: tuple[int, ...]
    split: Split

    def box(self, local_box: Box) -> Box:
        """A box of the matrix as a box of the local tensor."""
        return (*((number, number + 1) for number in self.index), *local_box)


#: By checkpoint tensor, layer by layer. Several spreads: ranks have it under different names.
Layout = Mapping[str, Sequence[Spread]]
