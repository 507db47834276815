"""Which boxes of one layout fill those of another, and who sends them.

The layers of a model differ in little but names: tensors whose sources are cut alike, and whose targets are, share one
`Match`, however many they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megarl.errors import MegarlError
from megarl.reshard.boxes import Box, cells, contains, extents, intersect, numel, to_local
from megarl.reshard.dealing import Deal, groups
from megarl.reshard.layout import Layout, Place, Split, Spread

#: Parts of a box that several holders share have at least that many elements; smaller ones would cost more than they
#: even out.
LEAST_PART = 1 << 16


class PlanError(MegarlError):
    """The layouts do not fit: names the tensor that is not covered, or covered twice."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A box that some ranks need and others hold all of. `box`: where it goes in the matrices of those that need it.

    `origins`: for every rank that holds it, which of the sources has it and where it lies in the matrix there.
    """

    box: Box
    origins: dict[int, tuple[int, Box]]
    deals: tuple[Deal, ...]


class Match:
    """Tensors whose sources are cut like `sources` and whose target is cut like `target`; `count` of them.

    `first` is which holder the turns begin with; `name` is one of the tensors, for messages.
    """

    def __init__(
        self, sources: Sequence[Split], target: Split, nodes: Sequence[int], *, count: int, first: int, name: str
    ) -> None:
        self.sources, self.target = tuple(sources), target
        self.count = count
        self._nodes, self._first, self._name = nodes, first, name
        self._cells: dict[int, tuple[Cell, ...]] = {}
        self._received: dict[int, list[tuple[Cell, Deal | None]]] = {}
        self._sent: dict[int, list[tuple[Cell, Deal]]] = {}

    def cells(self, place: int) -> tuple[Cell, ...]:
        """The cells of a place of the target, disjoint, in order. Raises `PlanError` for one without holder."""
        if place not in self._cells:
            self._cells[place] = tuple(self._cover(place))
        return self._cells[place]

    def received_by(self, rank: int) -> list[tuple[Cell, Deal | None]]:
        """The cells that `rank` needs, each with the deal in which it gets it; None: it holds the cell itself."""
        if rank not in self._received:
            found: list[tuple[Cell, Deal | None]] = []
            for place in self.target.of_rank.get(rank, ()):
                for cell in self.cells(place):
                    own = (deal for deal in cell.deals if rank in deal.group.needers)
                    found.append((cell, None if rank in cell.origins else next(own)))
            self._received[rank] = found
        return self._received[rank]

    def sent_by(self, rank: int) -> list[tuple[Cell, Deal]]:
        """The cells that `rank` holds and ranks near to it lack, with the deals in which it is a holder."""
        if rank not in self._sent:
            own = [split.places[number].hf_box for split in self.sources for number in split.of_rank.get(rank, ())]
            places = [
                number
                for number, place in enumerate(self.target.places)
                if any(intersect(place.hf_box, box) for box in own)
            ]
            self._sent[rank] = [
                (cell, deal)
                for place in places
                for cell in self.cells(place)
                if rank in cell.origins
                for deal in cell.deals
                if rank in deal.group.holders
            ]
        return self._sent[rank]

    def _cover(self, number: int) -> Iterator[Cell]:
        place = self.target.places[number]
        wanted = place.hf_box
        near = [
            (source, held)
            for source, split in enumerate(self.sources)
            for held in split.places
            if intersect(held.hf_box, wanted) is not None
        ]
        for place_of_cell, part in enumerate(cells(wanted, [held.hf_box for _, held in near]), number):
            origins: dict[int, tuple[int, Box]] = {}
            for source, held in near:
                if contains(held.hf_box, part):
                    box = to_local(held.hf_box, held.local_box, part)
                    for rank in held.ranks:
                        origins.setdefault(rank, (source, box))
            if not origins:
                raise PlanError(f"no rank holds box {part} of {self._name}, which rank {place.ranks[0]} needs")
            # What is left over of different tensors and cells goes to different holders.
            deals = self._deals(origins, place, part, self._first + place_of_cell)
            yield Cell(to_local(wanted, place.local_box, part), origins, deals)

    def _deals(self, origins: dict[int, tuple[int, Box]], place: Place, part: Box, first: int) -> tuple[Deal, ...]:
        most = min(numel(part) // LEAST_PART, max(extents(part)))
        found = groups(tuple(origins), place.ranks, self._nodes)
        return tuple(Deal(group, self.count, max(1, min(most, len(group.holders))), first) for group in found)


class Matched(NamedTuple):
    """A tensor in two layouts, number `number` of those that `match` describes."""

    name: str
    sources: Sequence[Spread]
    target: Spread
    match: Match
    number: int


def match(sources: Layout, targets: Layout, node_of_rank: Sequence[int]) -> Iterator[Matched]:
    """Every tensor of `targets`, in the order of `sources`. Raises `PlanError` for one that `sources` do not have."""
    for name in targets:
        if name not in sources:
            raise PlanError(f"no rank holds any of {name}")
    pairs = [
        (name, sources[name], target, (*map(_identity, sources[name]), _identity(target)))
        for name in sources
        for target in targets.get(name, ())
    ]
    counts = Counter(key for *_, key in pairs)
    found: dict[tuple[int, ...], Match] = {}
    numbers: Counter[tuple[int, ...]] = Counter()
    for place, (name, held, target, key) in enumerate(pairs):
        if key not in found:
            splits = [spread.split for spread in held]
            found[key] = Match(splits, target.split, node_of_rank, count=counts[key], first=place, name=name)
        yield Matched(name, held, target, found[key], numbers[key])
        numbers[key] += 1


def _identity(spread: Spread) -> int:
    return id(spread.split)
