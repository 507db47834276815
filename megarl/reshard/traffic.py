"""What a push moves on every rank, by what is alike among tensors and ranks instead of by everyone's plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megarl.reshard.boxes import extents, numel
from megarl.reshard.layout import Layout
from megarl.reshard.matching import Cell, Match, match
from megarl.reshard.wire import BYTES, Wire


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes by rank: copied within the rank; received from and sent to ranks of its node, and other nodes' ranks."""

    local: list[int]
    received_near: list[int]
    sent_near: list[int]
    received_far: list[int]
    sent_far: list[int]

    def received(self, rank: int) -> int:
        """Bytes that come to a rank from others."""
        return self.received_near[rank] + self.received_far[rank]

    def sent(self, rank: int) -> int:
        """Bytes that a rank sends to others."""
        return self.sent_near[rank] + self.sent_far[rank]


def count_traffic(sources: Layout, targets: Layout, node_of_rank: Sequence[int], wire: Wire) -> Traffic:
    """The traffic of the plans from `sources` to `targets`. Raises `PlanError` as they do.

    Tensors that are cut alike, as `match` has them, must travel in one type.
    """
    traffic = Traffic(*([0] * len(node_of_rank) for _ in range(5)))
    seen: set[int] = set()
    for one in match(sources, targets, node_of_rank):
        if id(one.match) not in seen:
            seen.add(id(one.match))
            _add(traffic, one.match, BYTES[wire(one.name)])
    return traffic


def _add(traffic: Traffic, found: Match, element: int) -> None:
    for number, place in enumerate(found.target.places):
        for cell in found.cells(number):
            size = numel(cell.box) * element
            for rank in place.ranks:
                if rank in cell.origins:
                    traffic.local[rank] += found.count * size
            _add_deals(traffic, found.count, cell, size)


def _add_deals(traffic: Traffic, count: int, cell: Cell, size: int) -> None:
    for deal in cell.deals:
        near = deal.group.same_node
        received = traffic.received_near if near else traffic.received_far
        sent = traffic.sent_near if near else traffic.sent_far
        for rank in deal.group.needers:
            received[rank] += count * size
        for rank in deal.group.holders:
            sent[rank] += deal.whole * size
        length = max(extents(cell.box))
        for turn in deal.rest():
            start, stop = turn.span(length)
            sent[turn.holder] += size // length * (stop - start)
