"""Boxes: which region of which checkpoint tensor lies where in a local tensor.

A box is a half-open rectangle, one `(start, stop)` per dimension, in elements. Every layout, of the
policy, of the engine, of a checkpoint on disk, is a set of local tensors described by regions in
the coordinates of the Hugging Face checkpoint, so that any layout can be cut against any other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from math import prod

from megarl.reshard.wire import BYTES, Wire

Box = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Region:
    """A rectangle of a checkpoint tensor and the place it takes in a local tensor.

    `hf_box` and `local_box` have the same extents; `local_box` may have further leading dimensions
    of extent 1 (a row of a stack of equal matrices).
    """

    hf_name: str
    hf_box: Box
    local_box: Box


@dataclass(frozen=True, slots=True)
class LocalTensor:
    """A tensor of one rank. What no region covers is padding and must hold zeros."""

    name: str
    shape: tuple[int, ...]
    regions: tuple[Region, ...]


def restrict(tensor: LocalTensor, box: Box) -> LocalTensor:
    """The part of `tensor` in `box`, as a tensor of its own. `tensor` must have no stacked regions."""
    regions: list[Region] = []
    for region in tensor.regions:
        common = intersect(region.local_box, box)
        if common is not None:
            shifts = [origin - place for (origin, _), (place, _) in zip(region.hf_box, region.local_box, strict=True)]
            hf_box = tuple((start + by, stop + by) for (start, stop), by in zip(common, shifts, strict=True))
            own = tuple((start - first, stop - first) for (start, stop), (first, _) in zip(common, box, strict=True))
            regions.append(Region(region.hf_name, hf_box, own))
    return LocalTensor(tensor.name, extents(box), tuple(regions))


def whole(shape: Sequence[int]) -> Box:
    """The box that covers a tensor of this shape."""
    return tuple((0, extent) for extent in shape)


def numel(box: Box) -> int:
    """Number of elements in the box."""
    return prod(stop - start for start, stop in box)


def extents(box: Box) -> tuple[int, ...]:
    """Length of the box along each dimension."""
    return tuple(stop - start for start, stop in box)


def intersect(left: Box, right: Box) -> Box | None:
    """The common part of two boxes of equal rank, or None where they share no element."""
    common = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(left, right, strict=True))
    return common if all(start < stop for start, stop in common) else None


def contains(outer: Box, inner: Box) -> bool:
    """Whether every element of `inner` is in `outer`."""
    return all(a <= c and d <= b for (a, b), (c, d) in zip(outer, inner, strict=True))


def to_local(region_hf_box: Box, region_local_box: Box, part: Box) -> Box:
    """Translate `part`, a box inside `region_hf_box`, to the coordinates of the local tensor."""
    leading = len(region_local_box) - len(part)
    inner = tuple(
        (start - origin + place, stop - origin + place)
        for (start, stop), (origin, _), (place, _) in zip(part, region_hf_box, region_local_box[leading:], strict=True)
    )
    return region_local_box[:leading] + inner


def narrow(box: Box, axis: int, start: int, stop: int) -> Box:
    """`box` with dimension `axis` narrowed to [start, stop) of itself."""
    spans = list(box)
    origin = spans[axis][0]
    spans[axis] = (origin + start, origin + stop)
    return tuple(spans)


def of_range(shape: Sequence[int], start: int, stop: int) -> list[Box]:
    """The boxes that elements [start, stop) of a row-major tensor of this shape make up.

    They come in the order of their elements, of which each has consecutive ones: at most two per dimension, less one.
    """
    if start >= stop:
        return []
    if not shape:
        return [()]
    row = prod(shape[1:])
    # Whole rows.
    first, last = -(-start // row), stop // row
    if first > last:
        return _in_row(shape, last, start - last * row, stop - last * row)
    head = _in_row(shape, first - 1, start - (first - 1) * row, row) if start < first * row else []
    tail = _in_row(shape, last, 0, stop - last * row)
    rows = [((first, last), *whole(shape[1:]))] if first < last else []
    return [*head, *rows, *tail]


def _in_row(shape: Sequence[int], number: int, start: int, stop: int) -> list[Box]:
    return [((number, number + 1), *box) for box in of_range(shape[1:], start, stop)]


def cells(box: Box, cuts: Iterable[Box]) -> list[Box]:
    """Split `box` so that each part lies wholly inside or wholly outside every box of `cuts`.

    The parts are disjoint, cover `box`, and come in row-major order.
    """
    edges: list[set[int]] = [set(span) for span in box]
    for cut in cuts:
        common = intersect(box, cut)
        if common is not None:
            for edge, span in zip(edges, common, strict=True):
                edge.update(span)
    return list(product(*(tuple(pairwise(sorted(edge))) for edge in edges)))


def overlap(boxes: Sequence[Box]) -> tuple[Box, Box] | None:
    """Two boxes that share an element, or None where all are disjoint."""
    ordered = sorted(boxes)
    for index, box in enumerate(ordered):
        for other in ordered[index + 1 :]:
            if other[0][0] >= box[0][1]:
                break
            if intersect(box, other) is not None:
                return box, other
    return None


def missing_bytes(wanted: Iterable[LocalTensor], held: Iterable[LocalTensor], wire: Wire) -> int:
    """How many bytes of the checkpoint `wanted` have that `held` do not: what must be sent at the least."""
    here: dict[str, list[Box]] = {}
    for tensor in held:
        for region in tensor.regions:
            here.setdefault(region.hf_name, []).append(region.hf_box)
    missing = 0
    for tensor in wanted:
        for region in tensor.regions:
            own = here.get(region.hf_name, [])
            parts = cells(region.hf_box, own)
            lacking = sum(numel(part) for part in parts if not any(contains(box, part) for box in own))
            missing += lacking * BYTES[wire(region.hf_name)]
    return missing


def padding_boxes(tensor: LocalTensor) -> tuple[Box, ...]:
    """The boxes of a local tensor that no region covers: disjoint, to be filled with zeros."""
    covered = [region.local_box for region in tensor.regions]
    if sum(map(numel, covered)) == prod(tensor.shape):
        return ()
    return tuple(
        cell for cell in cells(whole(tensor.shape), covered) if not any(contains(box, cell) for box in covered)
    )
