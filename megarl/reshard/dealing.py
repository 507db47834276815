"""Who sends what to whom where several ranks hold the same box: the nearest ones, in turns.

The turns follow from the two layouts alone, so that a rank finds its own sends and receives without looking at the
others'.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class Group:
    """Ranks that need a box and lack it, and those equally near to them that hold it; both ascending."""

    holders: tuple[int, ...]
    needers: tuple[int, ...]
    same_node: bool


class Turn(NamedTuple):
    """What `holder` sends to `needer`: piece `part` of `parts` equal pieces of the box."""

    holder: int
    needer: int
    part: int
    parts: int

    def span(self, length: int) -> tuple[int, int]:
        """The part of the box's longest dimension, of `length` elements."""
        return length * self.part // self.parts, length * (self.part + 1) // self.parts


def groups(holders: Sequence[int], needers: Sequence[int], node_of_rank: Sequence[int]) -> list[Group]:
    """The groups of a box: one for each node with both, and one of all whose nodes have no holder.

    Ranks that hold what they need are in none.
    """
    own = set(holders)
    holders_on: dict[int, list[int]] = {}
    for rank in sorted(own):
        holders_on.setdefault(node_of_rank[rank], []).append(rank)
    near: dict[int, list[int]] = {}
    far: list[int] = []
    for rank in sorted(set(needers) - own):
        node = node_of_rank[rank]
        if node in holders_on:
            near.setdefault(node, []).append(rank)
        else:
            far.append(rank)
    found = [Group(tuple(holders_on[node]), tuple(ranks), True) for node, ranks in near.items()]
    if far:
        found.append(Group(tuple(sorted(own)), tuple(far), False))
    return found


@dataclass(frozen=True, slots=True)
class Deal:
    """The turns of `group` over `count` boxes that are alike.

    All needs, box after box, are dealt to the holders in turns. Those left over when the turns no longer come out even
    are cut into `parts`, one for each of so many holders. `first`: which holder begins.
    """

    group: Group
    count: int
    parts: int
    first: int

    def received(self, box: int, rank: int) -> Iterator[Turn]:
        """The turns in which `rank` receives box number `box`."""
        needers = self.group.needers
        return self._turns(box * len(needers) + bisect_left(needers, rank), rank)

    def sent(self, box: int, rank: int) -> Iterator[Turn]:
        """The turns in which `rank` sends (parts of) box number `box`."""
        holders, needers = self.group.holders, self.group.needers
        start, stop = box * len(needers), (box + 1) * len(needers)
        own = bisect_left(holders, rank)
        even = min(stop, self._even)
        for unit in range(start + (own - self.first - start) % len(holders), even, len(holders)):
            yield Turn(rank, needers[unit - start], 0, 1)
        for unit in range(max(start, self._even), stop):
            yield from (turn for turn in self._turns(unit, needers[unit - start]) if turn.holder == rank)

    @property
    def whole(self) -> int:
        """How many needs each holder serves by sending the whole box, the same number for all."""
        return self._even // len(self.group.holders)

    def rest(self) -> Iterator[Turn]:
        """The turns of the needs beyond."""
        needers = self.group.needers
        for unit in range(self._even, self.count * len(needers)):
            yield from self._turns(unit, needers[unit % len(needers)])

    @property
    def _even(self) -> int:
        """How many needs can be dealt whole, the same number to each holder."""
        needs = self.count * len(self.group.needers)
        return needs - needs % len(self.group.holders)

    def _turns(self, unit: int, needer: int) -> Iterator[Turn]:
        holders = self.group.holders
        if unit < self._even:
            yield Turn(holders[(self.first + unit) % len(holders)], needer, 0, 1)
            return
        for part in range(self.parts):
            turn = self.first + (unit - self._even) * self.parts + part
            yield Turn(holders[turn % len(holders)], needer, part, self.parts)
