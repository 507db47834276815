"""Layouts of all ranks say what the weight map says of each."""

from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reshard_reference import make_shape, shapes
from reshard_worlds import cases, layout_of

from megarl.config.sections import ParallelSettings
from megarl.errors import Refusal
from megarl.reshard.model_layouts import checkpoint_layout, engine_layout, policy_layout
from megarl.reshard.weight_map import hf_tensors


def facts(layout):
    """Every (checkpoint tensor, local name, index, box, local box, rank)."""
    return {
        (name, spread.tensor, spread.index, place.hf_box, place.local_box, rank)
        for name, spreads in layout.items()
        for spread in spreads
        for place in spread.split.places
        for rank in place.ranks
    }


@settings(deadline=None, max_examples=80)
@given(cases())
def test_layouts_hold_the_regions_of_all_ranks(case):
    sources, targets = case.layouts()
    assert facts(sources) == facts(layout_of([case.policy(rank) for rank in range(case.world)]))
    assert facts(targets) == facts(layout_of([case.engine_of(rank) for rank in range(case.world)]))
    for layout in (sources, targets):
        assert layout.keys() == hf_tensors(case.shape).keys()
        for spreads in layout.values():
            for spread in spreads:
                for place in spread.split.places:
                    assert list(place.ranks) == sorted(set(place.ranks))


@settings(deadline=None)
@given(shapes(), st.integers(1, 5))
def test_checkpoint_shares_are_whole_tensors_in_order(shape, writers):
    layout = checkpoint_layout(shape, range(writers))
    assert list(layout) == list(hf_tensors(shape))
    owners = []
    for name, (spread,) in layout.items():
        (place,) = spread.split.places
        assert spread.tensor == name and place.hf_box == place.local_box
        assert tuple(stop for _, stop in place.hf_box) == hf_tensors(shape)[name]
        owners.extend(place.ranks)
    assert owners == sorted(owners) and set(owners) <= set(range(writers))


def test_checkpoint_shares_are_nearly_equal():
    shape = make_shape(num_layers=40)
    sizes = {name: prod(dims) for name, dims in hf_tensors(shape).items()}
    shares = [0] * 4
    for name, (spread,) in checkpoint_layout(shape, range(4)).items():
        shares[spread.split.places[0].ranks[0]] += sizes[name]
    assert all(abs(share - sum(shares) / 4) <= max(sizes.values()) for share in shares)


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(Refusal, match=r"parallel\.tensor=3: must divide the model's 4 attention heads"):
        policy_layout(make_shape(), ParallelSettings(tensor=3), 3)
    with pytest.raises(Refusal, match=r"rollout\.tensor=4: must divide the model's MLP size of 6"):
        engine_layout(make_shape(ffn_size=6), tensor=4, world=4)
