"""The plan, executed in one process: bitwise results, least traffic, and its refusals."""

from collections import Counter
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reshard_reference import (
    make_shape,
    megatron_reference,
    random_checkpoint,
    rank_tensors,
    shapes,
    slice_reader,
    vllm_reference,
)

from megarl.reshard.boxes import LocalTensor, Region, numel, padding_boxes
from megarl.reshard.copying import box_view, copy_box, read_local
from megarl.reshard.plan import PlanError, make_plan
from megarl.reshard.table import layer_of
from megarl.reshard.weight_map import checkpoint_tensors, hf_tensors, vllm_tensors


def megatron_coordinates(rank, tensor, pipeline, world):
    """(tensor rank, pipeline rank): Megatron counts tensor, then data, then pipeline."""
    return rank % tensor, rank // (world // pipeline)


def megatron_ranks(shape, tensor, pipeline, world):
    layouts = []
    for rank in range(world):
        tensor_rank, pipeline_rank = megatron_coordinates(rank, tensor, pipeline, world)
        layouts.append(
            rank_tensors(
                shape, tensor=tensor, pipeline=pipeline, tensor_rank=tensor_rank, pipeline_rank=pipeline_rank
            )
        )
    return layouts


def vllm_ranks(shape, tensor, world):
    return [vllm_tensors(shape, tensor=tensor, tensor_rank=rank % tensor) for rank in range(world)]


def load(layouts, checkpoint):
    reader = slice_reader(checkpoint)
    return [{name: read_local(one, reader, torch.float64) for name, one in layout.items()} for layout in layouts]


def run(transfers, sources, layouts):
    """Execute transfers on tensors in memory; targets start as NaN, their padding is zeroed."""
    targets = [{name: torch.full(one.shape, torch.nan).double() for name, one in ts.items()} for ts in layouts]
    for rank, layout in enumerate(layouts):
        for name, one in layout.items():
            for box in padding_boxes(one):
                box_view(targets[rank][name], box).zero_()
    for one in transfers:
        target = targets[one.target][one.target_name]
        copy_box(target, one.target_box, sources[one.source][one.source_name], one.source_box)
    return targets


@st.composite
def worlds(draw):
    """(model, policy tensor, policy pipeline, engine tensor, world, ranks per node)."""
    shape = draw(shapes())
    tensor, pipeline = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2]))
    engine = draw(st.sampled_from([1, 2, 4]))
    world = max(tensor * pipeline, engine) * draw(st.sampled_from([1, 2]))
    return shape, tensor, pipeline, engine, world, draw(st.sampled_from([1, 2, 4]))


@settings(deadline=None, max_examples=80)
@given(worlds())
def test_policy_shards_become_engine_shards_bitwise(world_of):
    shape, tensor, pipeline, engine, world, per_node = world_of
    checkpoint = random_checkpoint(shape)
    sources = [
        megatron_reference(shape, checkpoint, tensor, pipeline, *megatron_coordinates(rank, tensor, pipeline, world))
        for rank in range(world)
    ]
    layouts = vllm_ranks(shape, engine, world)
    nodes = [rank // per_node for rank in range(world)]
    plan = make_plan(megatron_ranks(shape, tensor, pipeline, world), layouts, nodes)
    targets = run(plan.transfers, sources, layouts)
    for rank in range(world):
        expected = vllm_reference(shape, checkpoint, engine, rank % engine)
        assert targets[rank].keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(targets[rank][name], value), (rank, name)


@settings(deadline=None, max_examples=40)
@given(worlds(), st.integers(1, 3))
def test_checkpoint_to_policy_to_checkpoint_is_the_identity(world_of, writers):
    shape, tensor, pipeline, _, world, per_node = world_of
    writers = min(writers, world)
    checkpoint = random_checkpoint(shape)
    layouts = megatron_ranks(shape, tensor, pipeline, world)
    empty = [{} for _ in range(world - writers)]
    shares = [checkpoint_tensors(shape, writers=writers, writer=writer) for writer in range(writers)] + empty
    plan = make_plan(layouts, shares, [rank // per_node for rank in range(world)])
    written = {}
    for share in run(plan.transfers, load(layouts, checkpoint), shares):
        assert not written.keys() & share.keys()
        written |= share
    assert written.keys() == checkpoint.keys() == hf_tensors(shape).keys()
    assert all(torch.equal(written[name], checkpoint[name]) for name in checkpoint)


def elements(layout, checkpoint):
    """The identity of every checkpoint element that a rank's tensors contain, counted."""
    ids, start = {}, 0
    for name, value in checkpoint.items():
        ids[name] = torch.arange(start, start + value.numel()).reshape(value.shape)
        start += value.numel()
    found = [box_view(ids[r.hf_name], r.hf_box).flatten() for one in layout.values() for r in one.regions]
    return Counter(torch.cat(found).tolist())


@settings(deadline=None, max_examples=30)
@given(worlds())
def test_each_rank_receives_exactly_what_it_needs_and_lacks_from_the_nearest_node(world_of):
    shape, tensor, pipeline, engine, world, per_node = world_of
    checkpoint = random_checkpoint(shape)
    sources, targets = megatron_ranks(shape, tensor, pipeline, world), vllm_ranks(shape, engine, world)
    nodes = [rank // per_node for rank in range(world)]
    plan = make_plan(sources, targets, nodes)
    held = [set(elements(layout, checkpoint)) for layout in sources]
    for rank in range(world):
        needed = elements(targets[rank], checkpoint)
        assert max(needed.values()) == 1
        received = sum(one.numel for one in plan.receives(rank))
        assert received == len(set(needed) - held[rank])
        assert sum(one.numel for one in plan.local(rank)) == len(set(needed) & held[rank])
        on_node = set().union(*(held[other] for other in range(world) if nodes[other] == nodes[rank]))
        from_afar = sum(one.numel for one in plan.receives(rank) if nodes[one.source] != nodes[rank])
        assert from_afar == len(set(needed) - on_node)


def test_sends_and_receives_are_the_same_transfers_in_the_order_of_the_layers():
    shape = make_shape(num_layers=4)
    plan = make_plan(megatron_ranks(shape, 2, 2, 4), vllm_ranks(shape, 2, 4), [0, 0, 1, 1])
    parts = [one for rank in range(4) for one in (*plan.local(rank), *plan.receives(rank))]
    assert Counter(parts) == Counter(plan.transfers)
    assert Counter(one for rank in range(4) for one in plan.sends(rank)) == Counter(
        one for rank in range(4) for one in plan.receives(rank)
    )
    order = ["model.embed_tokens", *(f"model.layers.{layer}" for layer in range(4)), "model.norm", "lm_head"]
    places = [next(i for i, prefix in enumerate(order) if one.target_name.startswith(prefix)) for one in plan.transfers]
    assert places == sorted(places) and set(places) == set(range(len(order)))


def test_replicas_that_hold_the_same_share_the_sending_evenly():
    """8 data-parallel copies on 8 nodes feed 8 ranks that hold nothing: each copy sends one eighth, layer by layer."""
    weight = LocalTensor("w", (6, 5), (Region("model.layers.0.w", ((0, 6), (0, 5)), ((0, 6), (0, 5))),))
    sources = [{"w": weight}] * 8 + [{}] * 8
    targets = [{}] * 8 + [{"w": weight}] * 8
    plan = make_plan(sources, targets, list(range(16)))
    assert [sum(one.numel for one in plan.sends(rank)) for rank in range(8)] == [30] * 8
    traffic = plan.summary(bytes_per_element=2)
    assert (traffic.local, traffic.same_node, traffic.cross_node) == (0, 0, 8 * 60)
    assert traffic.most_sent == traffic.most_received == 60 and set(traffic.by_link.values()) == {60}


def test_same_node_is_preferred_to_an_idle_rank_elsewhere():
    weight = LocalTensor("w", (2,), (Region("w", ((0, 2),), ((0, 2),)),))
    plan = make_plan([{"w": weight}, {"w": weight}, {}, {}], [{}, {}, {"w": weight}, {"w": weight}], [0, 1, 1, 1])
    assert [one.source for one in plan.transfers] == [1, 1]
    assert plan.summary(4).same_node == 16 and plan.summary(4).cross_node == 0


@settings(deadline=None, max_examples=30)
@given(worlds(), st.integers(1, 400))
def test_buckets_bound_every_rank_and_change_nothing(world_of, bound):
    shape, tensor, pipeline, engine, world, per_node = world_of
    checkpoint = random_checkpoint(shape)
    sources, targets = megatron_ranks(shape, tensor, pipeline, world), vllm_ranks(shape, engine, world)
    plan = make_plan(sources, targets, [rank // per_node for rank in range(world)])
    buckets = plan.buckets(bound)
    for bucket in buckets:
        assert bucket
        moved = Counter()
        for one in bucket:
            if one.source != one.target:
                moved[one.source] += one.numel
                moved[one.target] += one.numel
        assert max([*moved.values(), 0]) <= bound
    shards = load(sources, checkpoint)
    flat = [one for bucket in buckets for one in bucket]
    for ours, reference in zip(run(flat, shards, targets), run(plan.transfers, shards, targets), strict=True):
        assert all(torch.equal(ours[name], reference[name]) for name in reference)


def test_buckets_of_a_large_bound_are_one():
    shape = make_shape()
    plan = make_plan(megatron_ranks(shape, 1, 1, 2), vllm_ranks(shape, 2, 2), [0, 0])
    assert plan.buckets(1) == (plan.transfers,)  # all copies are local
    plan = make_plan(megatron_ranks(shape, 2, 1, 2), vllm_ranks(shape, 1, 2), [0, 0])
    assert plan.buckets(10**9) == (plan.transfers,)
    with pytest.raises(ValueError, match="max_elements=0"):
        plan.buckets(0)


def test_experts_of_a_stack_are_planned_like_matrices():
    """A source with one matrix per expert fills a target that stacks them: the boxes differ in a leading dimension."""
    hf = {f"e{index}": torch.arange(index * 6, index * 6 + 6).reshape(2, 3).double() for index in range(3)}
    whole = ((0, 2), (0, 3))
    experts = {name: LocalTensor(name, (2, 3), (Region(name, whole, whole),)) for name in hf}
    sources = [{"e0": experts["e0"], "e2": experts["e2"]}, {"e1": experts["e1"]}]
    regions = tuple(Region(f"e{index}", whole, ((index, index + 1), *whole)) for index in range(3))
    targets = [{"stack": LocalTensor("stack", (3, 2, 3), regions)}] * 2
    plan = make_plan(sources, targets, [0, 0])
    filled = run([one for bucket in plan.buckets(4) for one in bucket], load(sources, hf), targets)
    assert all(torch.equal(rank["stack"], torch.stack(list(hf.values()))) for rank in filled)


ONE = Region("h", ((0, 2), (0, 3)), ((0, 2), (0, 3)))
BAD_PLANS = {
    "not covered": (
        LocalTensor("s", (1, 3), (Region("h", ((0, 1), (0, 3)), ((0, 1), (0, 3))),)),
        LocalTensor("t", (2, 3), (ONE,)),
        r"t on rank 0: no source rank holds box \(\(1, 2\), \(0, 3\)\) of h",
    ),
    "written twice": (
        LocalTensor("s", (2, 3), (ONE,)),
        LocalTensor("t", (2, 3), (ONE, Region("h", ((0, 1), (0, 1)), ((1, 2), (2, 3))))),
        r"t on rank 0: boxes .* would both be written",
    ),
    "out of bounds": (
        LocalTensor("s", (2, 3), (ONE,)),
        LocalTensor("t", (1, 3), (ONE,)),
        r"t on rank 0: box .* does not fit shape \(1, 3\)",
    ),
    "extents differ": (
        LocalTensor("s", (2, 3), (ONE,)),
        LocalTensor("t", (3, 2), (Region("h", ((0, 2), (0, 3)), ((0, 3), (0, 2))),)),
        r"t on rank 0: box .* does not fit",
    ),
    "another name": (
        LocalTensor("s", (2, 3), (Region("other", *[((0, 2), (0, 3))] * 2),)),
        LocalTensor("t", (2, 3), (ONE,)),
        r"t on rank 0: no source rank holds .* of h",
    ),
}


@pytest.mark.parametrize("case", BAD_PLANS)
def test_layouts_that_do_not_fit_are_named(case):
    source, target, message = BAD_PLANS[case]
    with pytest.raises(PlanError, match=message):
        make_plan([{"s": source}], [{"t": target}], [0])


def test_one_layout_per_rank_is_needed():
    with pytest.raises(PlanError, match="1 source ranks, 2 target ranks and 2 nodes"):
        make_plan([{}], [{}, {}], [0, 0])


def test_32b_plan_on_64_ranks():
    """Qwen2.5-32B from TP 8 x PP 4 x DP 2 to 16 engines of TP 4: traffic in closed form."""
    shape = make_shape(
        hidden_size=5120, num_layers=64, num_heads=40, num_kv_heads=8, head_dim=128, ffn_size=27648, vocab_size=152_064
    )
    sources, targets = megatron_ranks(shape, 8, 4, 64), vllm_ranks(shape, 4, 64)
    plan = make_plan(sources, targets, [rank // 8 for rank in range(64)])
    traffic = plan.summary(bytes_per_element=2)
    needed = sum(numel(r.hf_box) for rank in targets for one in rank.values() for r in one.regions)
    assert traffic.local + traffic.same_node + traffic.cross_node == 2 * needed
    # A node of 8 ranks holds one stage whole: its two engines fetch the other stages from afar. An
    # engine has 4 copies of every norm and one of all else.
    stages = [0] * 4
    for name, dims in hf_tensors(shape).items():
        layer = layer_of(name)
        stages[max(0, min(layer, 63)) // 16] += prod(dims) * (4 if "norm" in name else 1)
    afar = sum(2 * 2 * (sum(stages) - held) for held in stages)
    assert traffic.cross_node == 2 * afar
    # The 16 ranks of a stage share its sending to other nodes; the first and the last also have the vocabulary.
    for stage in range(4):
        ranks = range(16 * stage, 16 * stage + 16)
        sent = [sum(one.numel for one in plan.sends(rank) if one.target // 8 != rank // 8) for rank in ranks]
        assert max(sent) <= 1.001 * sum(sent) / 16
