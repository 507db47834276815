"""The reshard plan: which box of which rank's tensor goes into which box of which rank's tensor.

Computed once, by every rank alike, from the layouts alone; no communication, no tensors. What a rank
holds itself it copies; what it lacks it receives once, from the nearest holder, and holders that are
equally near share the sending evenly. Nothing whole is ever gathered.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from megarl.errors import MegarlError
from megarl.reshard.boxes import (
    Box,
    LocalTensor,
    Region,
    cells,
    contains,
    extents,
    intersect,
    numel,
    overlap,
    to_local,
    whole,
)
from megarl.reshard.table import layer_of


class PlanError(MegarlError):
    """The layouts do not fit: names the tensor that is not covered, covered twice, or out of bounds."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """One box copied from a tensor of rank `source` to a tensor of rank `target`.

    Both boxes have the same extents, leading dimensions of extent 1 aside.
    """

    source: int
    target: int
    source_name: str
    source_box: Box
    target_name: str
    target_box: Box

    @property
    def numel(self) -> int:
        """Elements copied."""
        return numel(self.target_box)


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that a plan moves: within ranks, between ranks of a node, between nodes; at the busiest rank; by link.

    `by_link` has the ranks (source, target) as keys.
    """

    local: int
    same_node: int
    cross_node: int
    most_sent: int
    most_received: int
    by_link: dict[tuple[int, int], int]


@dataclass(frozen=True)
class Plan:
    """All transfers, in the order of the layers, the same on every rank. `node_of_rank` as given."""

    transfers: tuple[Transfer, ...]
    node_of_rank: tuple[int, ...]

    @cached_property
    def _by_rank(self) -> tuple[dict[int, list[Transfer]], dict[int, list[Transfer]], dict[int, list[Transfer]]]:
        local, sends, receives = defaultdict(list), defaultdict(list), defaultdict(list)
        for transfer in self.transfers:
            if transfer.source == transfer.target:
                local[transfer.source].append(transfer)
            else:
                sends[transfer.source].append(transfer)
                receives[transfer.target].append(transfer)
        return dict(local), dict(sends), dict(receives)

    def local(self, rank: int) -> tuple[Transfer, ...]:
        """Copies within the rank."""
        return tuple(self._by_rank[0].get(rank, ()))

    def sends(self, rank: int) -> tuple[Transfer, ...]:
        """What the rank sends to others, in the order of the layers."""
        return tuple(self._by_rank[1].get(rank, ()))

    def receives(self, rank: int) -> tuple[Transfer, ...]:
        """What the rank receives from others, in the order of the layers."""
        return tuple(self._by_rank[2].get(rank, ()))

    def buckets(self, max_elements: int) -> tuple[tuple[Transfer, ...], ...]:
        """Consecutive groups of transfers in which no rank sends and receives more than `max_elements` together.

        A transfer between ranks that alone exceeds the bound is cut into several; copies within a
        rank need no staging and do not count. Raises `ValueError` unless `max_elements` ≥ 1.
        """
        if max_elements < 1:
            raise ValueError(f"max_elements={max_elements}: must be at least 1")
        groups: list[tuple[Transfer, ...]] = []
        group: list[Transfer] = []
        moved: dict[int, int] = defaultdict(int)
        for whole_transfer in self.transfers:
            if whole_transfer.source == whole_transfer.target:
                group.append(whole_transfer)
                continue
            for transfer in _slabs(whole_transfer, max_elements):
                size = transfer.numel
                if max(moved[transfer.source], moved[transfer.target]) + size > max_elements:
                    groups.append(tuple(group))
                    group = []
                    moved.clear()
                group.append(transfer)
                moved[transfer.source] += size
                moved[transfer.target] += size
        if group:
            groups.append(tuple(group))
        return tuple(groups)

    def summary(self, bytes_per_element: int) -> Traffic:
        """The traffic of one execution of the plan, in bytes."""
        by_link: dict[tuple[int, int], int] = defaultdict(int)
        sent: dict[int, int] = defaultdict(int)
        received: dict[int, int] = defaultdict(int)
        local = same_node = cross_node = 0
        for transfer in self.transfers:
            size = transfer.numel * bytes_per_element
            source, target = transfer.source, transfer.target
            if source == target:
                local += size
                continue
            by_link[source, target] += size
            sent[source] += size
            received[target] += size
            if self.node_of_rank[source] == self.node_of_rank[target]:
                same_node += size
            else:
                cross_node += size
        most_sent, most_received = max(sent.values(), default=0), max(received.values(), default=0)
        return Traffic(local, same_node, cross_node, most_sent, most_received, dict(by_link))


def _slabs(transfer: Transfer, max_elements: int) -> list[Transfer]:
    """Cut a transfer into slabs of at most `max_elements` along its first dimension that is not 1."""
    if transfer.numel <= max_elements:
        return [transfer]
    box = transfer.target_box
    axis = next(axis for axis in range(-len(box), 0) if box[axis][1] - box[axis][0] > 1)
    length = box[axis][1] - box[axis][0]
    step = max(1, max_elements * length // transfer.numel)
    slabs: list[Transfer] = []
    for start in range(0, length, step):
        stop = min(start + step, length)
        slab = replace(
            transfer,
            source_box=_narrow(transfer.source_box, axis, start, stop),
            target_box=_narrow(box, axis, start, stop),
        )
        # A single row can still be too long: it is cut along the next dimension.
        slabs.extend(_slabs(slab, max_elements))
    return slabs


def _narrow(box: Box, axis: int, start: int, stop: int) -> Box:
    """`box` with dimension `axis` (negative) narrowed to [start, stop) of itself."""
    spans = list(box)
    origin = spans[axis][0]
    spans[axis] = (origin + start, origin + stop)
    return tuple(spans)


@dataclass(frozen=True, slots=True)
class _Held:
    """A region and where it is."""

    rank: int
    tensor: str
    region: Region


@dataclass(frozen=True, slots=True)
class _Cell:
    """A box that one target region needs, and who can provide it, best kind of holder only.

    `need` indexes the regions that need; `holders` are (rank, index of the region held, box in its
    tensor). `kind` is 0 for the target rank itself, 1 for ranks of its node, 2 for others.
    """

    need: int
    target_box: Box
    kind: int
    holders: tuple[tuple[int, int, Box], ...]


def make_plan(
    sources: Sequence[Mapping[str, LocalTensor]],
    targets: Sequence[Mapping[str, LocalTensor]],
    node_of_rank: Sequence[int],
) -> Plan:
    """Plan the copies that fill every target tensor from the source tensors.

    `sources` and `targets` have one mapping per rank (empty where the rank takes no part);
    `node_of_rank` says which ranks share a node. The result depends on nothing else, so every rank
    computes the same plan.

    Raises `PlanError` where the sources do not cover a target, where two regions of a target
    overlap or leave its shape, and where the three sequences differ in length.
    """
    if not len(sources) == len(targets) == len(node_of_rank):
        raise PlanError(
            f"the plan got {len(sources)} source ranks, {len(targets)} target ranks and {len(node_of_rank)} nodes: "
            "one of each per rank is needed"
        )
    _check_regions(targets)
    held = _by_hf_name(sources)
    needed = _by_hf_name(targets)
    # The layers of a model differ in nothing but names: their geometry is computed once.
    geometry: dict[tuple[object, object], list[_Cell]] = {}
    # NVLink and the network are different resources: even shares are kept on each.
    sent: dict[int, list[int]] = {kind: [0] * len(sources) for kind in (0, 1, 2)}
    transfers: list[Transfer] = []
    for hf_name in sorted(needed, key=layer_of):
        holders, needs = held.get(hf_name, []), needed[hf_name]
        key = (_signature(holders), _signature(needs))
        if key not in geometry:
            geometry[key] = _cover(holders, needs, node_of_rank)
        for cell in geometry[key]:
            need = needs[cell.need]
            load = sent[cell.kind]
            _, rank, index, source_box = min((load[rank], rank, index, box) for rank, index, box in cell.holders)
            load[rank] += numel(cell.target_box)
            transfers.append(Transfer(rank, need.rank, holders[index].tensor, source_box, need.tensor, cell.target_box))
    return Plan(tuple(transfers), tuple(node_of_rank))


def _by_hf_name(ranks: Sequence[Mapping[str, LocalTensor]]) -> dict[str, list[_Held]]:
    """All regions of all ranks, by checkpoint tensor, in order of first appearance."""
    found: dict[str, list[_Held]] = {}
    for rank, tensors in enumerate(ranks):
        for name, tensor in tensors.items():
            for region in tensor.regions:
                found.setdefault(region.hf_name, []).append(_Held(rank, name, region))
    return found


def _signature(held: Sequence[_Held]) -> tuple[tuple[int, Box, Box], ...]:
    return tuple((one.rank, one.region.hf_box, one.region.local_box) for one in held)


def _check_regions(ranks: Sequence[Mapping[str, LocalTensor]]) -> None:
    """Refuse regions that overlap, leave their tensor, or whose two boxes have different extents."""
    checked: set[tuple[object, ...]] = set()
    for rank, tensors in enumerate(ranks):
        for name, tensor in tensors.items():
            key = (tensor.shape, tuple((region.hf_box, region.local_box) for region in tensor.regions))
            if key in checked:
                continue
            checked.add(key)
            for region in tensor.regions:
                inside = len(region.local_box) == len(tensor.shape) and contains(whole(tensor.shape), region.local_box)
                leading = len(region.local_box) - len(region.hf_box)
                if not inside or extents(region.local_box) != (1,) * leading + extents(region.hf_box):
                    raise PlanError(
                        f"{name} on rank {rank}: box {region.local_box} does not fit shape {tensor.shape} and "
                        f"box {region.hf_box} of {region.hf_name}"
                    )
            twice = overlap([region.local_box for region in tensor.regions])
            if twice:
                raise PlanError(f"{name} on rank {rank}: boxes {twice[0]} and {twice[1]} would both be written")


def _cover(holders: Sequence[_Held], needs: Sequence[_Held], node_of_rank: Sequence[int]) -> list[_Cell]:
    """Cut each needed region at the borders of the held ones and find the nearest holders of each part."""
    by_box: dict[Box, list[int]] = {}
    for index, one in enumerate(holders):
        by_box.setdefault(one.region.hf_box, []).append(index)
    covered: list[_Cell] = []
    for index, need in enumerate(needs):
        wanted = need.region.hf_box
        near = [box for box in by_box if intersect(box, wanted) is not None]
        for part in cells(wanted, near):
            found = [holder for box in near if contains(box, part) for holder in by_box[box]]
            if not found:
                raise PlanError(
                    f"{need.tensor} on rank {need.rank}: no source rank holds box {part} of {need.region.hf_name}"
                )
            distance = [_distance(holders[holder].rank, need.rank, node_of_rank) for holder in found]
            kind = min(distance)
            nearest: list[tuple[int, int, Box]] = []
            for holder, far in zip(found, distance, strict=True):
                if far == kind:
                    one = holders[holder]
                    box = to_local(one.region.hf_box, one.region.local_box, part)
                    nearest.append((one.rank, holder, box))
            covered.append(_Cell(index, to_local(wanted, need.region.local_box, part), kind, tuple(nearest)))
    return covered


def _distance(source: int, target: int, node_of_rank: Sequence[int]) -> int:
    """0 within a rank, 1 within a node, 2 across nodes."""
    if source == target:
        return 0
    return 1 if node_of_rank[source] == node_of_rank[target] else 2
