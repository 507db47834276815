"""Boxes: cutting, translating, padding, and copies through torch."""

from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megarl.errors import Refusal
from megarl.reshard.boxes import (
    LocalTensor,
    Region,
    cells,
    contains,
    intersect,
    numel,
    of_range,
    overlap,
    padding_boxes,
    to_local,
    whole,
)
from megarl.reshard.copying import box_view, copy_box, read_local


@st.composite
def boxes(draw, dims=2, limit=7):
    spans = []
    for _ in range(dims):
        start = draw(st.integers(0, limit - 1))
        spans.append((start, draw(st.integers(start + 1, limit))))
    return tuple(spans)


def painted(box, limit=7):
    grid = torch.zeros(*[limit] * len(box), dtype=torch.bool)
    box_view(grid, box)[...] = True
    return grid


@given(boxes(), boxes())
def test_intersection_is_the_intersection_of_the_elements(left, right):
    common = intersect(left, right)
    elements = painted(left) & painted(right)
    assert (common is None) == (not elements.any())
    if common is not None:
        assert torch.equal(painted(common), elements)
    assert contains(left, right) == bool((painted(right) <= painted(left)).all())
    assert (overlap([left, right]) is not None) == (common is not None)


@given(boxes(), st.lists(boxes(), max_size=4))
def test_cells_cover_the_box_once_and_never_straddle_a_cut(box, cuts):
    parts = cells(box, cuts)
    count = sum((painted(part).int() for part in parts), torch.zeros(7, 7, dtype=torch.int))
    assert torch.equal(count, painted(box).int())
    for part in parts:
        for cut in cuts:
            assert intersect(part, cut) is None or contains(cut, part)


@given(st.lists(st.integers(1, 4), max_size=4), st.data())
def test_a_flat_range_is_a_few_boxes_in_its_order(shape, data):
    elements = torch.arange(prod(shape)).view(shape)
    start = data.draw(st.integers(0, elements.numel()))
    stop = data.draw(st.integers(start, elements.numel()))
    found = of_range(shape, start, stop)
    parts = [box_view(elements, box) for box in found]
    assert [int(one) for part in parts for one in part.flatten()] == list(range(start, stop))
    assert len(found) <= max(1, 2 * len(shape) - 1)


@given(st.lists(boxes(dims=3, limit=5), max_size=6))
def test_overlap_finds_a_pair_exactly_where_an_element_is_covered_twice(many):
    count = sum((painted(box, 5).int() for box in many), torch.zeros(5, 5, 5, dtype=torch.int))
    pair = overlap(many)
    assert (pair is not None) == bool((count > 1).any())
    if pair is not None:
        assert intersect(*pair) is not None


def test_to_local_keeps_leading_dimensions_of_a_stack():
    assert to_local(((4, 8), (0, 3)), ((2, 3), (10, 14), (0, 3)), ((5, 7), (1, 2))) == ((2, 3), (11, 13), (1, 2))


@given(st.lists(boxes(), max_size=3))
def test_padding_boxes_are_what_no_region_covers(many):
    disjoint = [box for index, box in enumerate(many) if not any(intersect(box, other) for other in many[:index])]
    tensor = LocalTensor("t", (7, 7), tuple(Region("h", box, box) for box in disjoint))
    covered = sum((painted(box).int() for box in (*disjoint, *padding_boxes(tensor))), torch.zeros(7, 7).int())
    assert torch.equal(covered, torch.ones(7, 7, dtype=torch.int))
    assert numel(whole(tensor.shape)) == 49


def test_copy_box_moves_into_a_stack_and_converts_the_type():
    source = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    stack = torch.zeros(2, 3, 4, dtype=torch.bfloat16)
    copy_box(stack, ((1, 2), (0, 2), (1, 3)), source, ((1, 3), (2, 4)))
    expected = torch.zeros(2, 3, 4)
    expected[1, 0:2, 1:3] = torch.tensor([[6.0, 7.0], [10.0, 11.0]])
    assert torch.equal(stack.float(), expected)
    back = torch.zeros(3, 4, dtype=torch.bfloat16)
    copy_box(back, ((1, 3), (2, 4)), stack, ((1, 2), (0, 2), (1, 3)))
    assert back.float().tolist() == [[0, 0, 0, 0], [0, 0, 6, 7], [0, 0, 10, 11]]


@pytest.mark.parametrize("source_box", [((0, 2), (0, 3)), ((0, 6),), ((0, 1), (0, 3), (0, 2))])
def test_copy_box_refuses_other_extents_even_with_as_many_elements(source_box):
    source = torch.zeros([stop for _, stop in source_box])
    with pytest.raises(ValueError, match="cannot be copied"):
        copy_box(torch.zeros(2, 3, 2), ((0, 2), (0, 3), (0, 1)), source, source_box)


def test_read_local_reads_only_its_boxes_and_zeroes_the_rest():
    asked = []

    def reader(name, box):
        asked.append((name, box))
        return box_view(torch.arange(20, dtype=torch.float64).reshape(5, 4), box)

    tensor = LocalTensor("t", (4, 2), (Region("h", ((3, 5), (2, 4)), ((0, 2), (0, 2))),))
    assert read_local(tensor, reader).tolist() == [[14, 15], [18, 19], [0, 0], [0, 0]]
    assert asked == [("h", ((3, 5), (2, 4)))]
    assert read_local(tensor, reader).dtype == torch.float64
    assert read_local(tensor, reader, torch.bfloat16).dtype == torch.bfloat16
    empty = read_local(LocalTensor("pad", (2, 2), ()), reader, torch.bfloat16)
    assert empty.dtype == torch.bfloat16 and not empty.any()


def test_read_local_refuses_a_checkpoint_tensor_that_is_too_small():
    tensor = LocalTensor("t", (4, 2), (Region("lm_head.weight", ((0, 4), (0, 2)), ((0, 4), (0, 2))),))
    with pytest.raises(Refusal, match=r"lm_head\.weight in the checkpoint.*gave shape \(3, 2\)"):
        read_local(tensor, lambda name, box: torch.zeros(3, 2))
