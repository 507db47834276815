"""Plans executed in one process: every element gets its own value once, with the least traffic, and nobody waits."""

import cProfile
import zlib
from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reshard_reference import make_shape, megatron_reference, random_checkpoint, slice_reader, vllm_reference
from reshard_worlds import ONE_BYTE, Case, blank, cases, execute, execute_in_calls, layout_of, moe_shape, plan_of

from megarl.config.sections import ParallelSettings
from megarl.reshard import matching
from megarl.reshard.boxes import LocalTensor, Region, missing_bytes, numel, padding_boxes
from megarl.reshard.copying import box_view, read_local
from megarl.reshard.model_layouts import checkpoint_layout, lanes, policy_layout
from megarl.reshard.plan import PlanError
from megarl.reshard.weight_map import hf_tensors
from megarl.reshard.wire import all_in


def load(tensors, checkpoint):
    reader = slice_reader(checkpoint)
    return {name: read_local(one, reader, torch.float64) for name, one in tensors.items()}


def pushed(case, bucket_bytes, checkpoint):
    """The engines' tensors of all ranks after the plans have run; padding holds -1."""
    sources = [load(case.policy(rank), checkpoint) for rank in range(case.world)]
    targets = [blank(case.engine_of(rank)) for rank in range(case.world)]
    execute(case.plans(bucket_bytes, mixed), sources, targets)
    return targets


def mixed(name):
    """Tensors of all types in one message."""
    return ("e4m3", "bf16", "fp32")[zlib.crc32(name.encode()) % 3]


#: Each rank has one whole expert.
ONE_EXPERT_EACH = Case(moe_shape("mixtral"), ParallelSettings(expert=4), 4, True, 4, 2)


@settings(deadline=None, max_examples=150)
@given(cases(), st.integers(1, 3000))
@example(ONE_EXPERT_EACH, 3000)
def test_every_engine_element_gets_its_own_value_once(case, bucket_bytes):
    checkpoint = random_checkpoint(case.shape)
    for rank, tensors in enumerate(pushed(case, bucket_bytes, checkpoint)):
        for name, tensor in case.engine_of(rank).items():
            expected = read_local(tensor, slice_reader(checkpoint), torch.float64)
            for box in padding_boxes(tensor):
                box_view(expected, box).fill_(-1)
            assert torch.equal(tensors[name], expected), (rank, name)


@pytest.mark.parametrize("tensor, pipeline, engine", [(1, 1, 4), (2, 2, 2), (4, 2, 1), (2, 1, 4)])
def test_shards_cut_by_hand_become_shards_cut_by_hand(tensor, pipeline, engine):
    """Both ends are made by cutting whole fused tensors, without the weight map."""
    shape, world = make_shape(num_kv_heads=2, num_layers=4), 8
    case = Case(shape, ParallelSettings(tensor=tensor, pipeline=pipeline), engine, False, world, 4)
    checkpoint = random_checkpoint(shape)
    places = [(grid.tensor_rank, grid.pipeline_rank) for grid in map(case.grid, range(world))]
    sources = [megatron_reference(shape, checkpoint, tensor, pipeline, *place) for place in places]
    targets = [blank(case.engine_of(rank)) for rank in range(world)]
    execute(case.plans(500), sources, targets)
    for rank in range(world):
        for name, value in vllm_reference(shape, checkpoint, engine, rank % engine).items():
            for box in padding_boxes(case.engine_of(rank)[name]):
                box_view(targets[rank][name], box).zero_()
            assert torch.equal(targets[rank][name], value), (rank, name)


@settings(deadline=None, max_examples=40)
@given(cases(), st.integers(1, 3))
def test_policy_to_checkpoint_gives_the_checkpoint(case, writers):
    checkpoint = random_checkpoint(case.shape)
    sources = policy_layout(case.shape, case.parallel, case.world)
    shares = checkpoint_layout(case.shape, range(min(writers, case.world)))
    dims = hf_tensors(case.shape)
    targets = [
        {name: torch.full(dims[name], -1.0).double() for name, (one,) in shares.items() if rank in one.split.of_rank}
        for rank in range(case.world)
    ]
    stages = lanes(case.parallel, case.world)
    plans = [plan_of(rank, sources, shares, case.nodes, stages, 1000) for rank in range(case.world)]
    execute(plans, [load(case.policy(rank), checkpoint) for rank in range(case.world)], targets)
    written = {name: tensor for share in targets for name, tensor in share.items()}
    assert sum(map(len, targets)) == len(written) and written.keys() == checkpoint.keys()
    assert all(torch.equal(written[name], checkpoint[name]) for name in checkpoint)


@settings(deadline=None, max_examples=60)
@given(cases())
def test_each_rank_receives_exactly_what_it_needs_and_lacks_from_the_nearest_node(case):
    plans, nodes = case.plans(), case.nodes
    policy = [case.policy(rank) for rank in range(case.world)]
    for rank, plan in enumerate(plans):
        engine = case.engine_of(rank)
        needed = sum(numel(region.hf_box) for tensor in engine.values() for region in tensor.regions)
        missing = missing_bytes(engine.values(), policy[rank].values(), ONE_BYTE)
        assert sum(one.numel for one in plan.receives()) == missing
        assert sum(one.numel for one in plan.local()) == needed - missing
        on_node = [t for other in range(case.world) if nodes[other] == nodes[rank] for t in policy[other].values()]
        from_afar = sum(one.numel for one in plan.receives() if nodes[one.source] != nodes[rank])
        assert from_afar == missing_bytes(engine.values(), on_node, ONE_BYTE)


@settings(deadline=None, max_examples=80)
@given(cases(), st.sampled_from([1, 50, 400, 3000, 10**9]))
def test_nobody_waits_for_ever_where_a_turn_is_a_call_and_calls_follow_each_other(case, bound):
    execute_in_calls(case.plans(bound))


@settings(deadline=None, max_examples=40)
@given(cases(), st.integers(8, 400))
def test_rounds_are_as_full_as_the_bound_allows(case, bound):
    for plan in case.plans(bound):
        for one, after in pairwise(plan.rounds):
            assert one.nbytes + after.messages[0].nbytes > bound
            # So that there is always another message to come.
            assert all(message.nbytes <= max(1, bound // 4) for message in one.messages)


@settings(deadline=None, max_examples=40)
@given(cases(), st.integers(1, 400))
def test_rounds_keep_the_bound_whatever_it_is(case, bound):
    for plan in case.plans(bound) + case.plans(bound, mixed):
        for one in plan.rounds:
            assert one.messages or one.local
            # One element of 4 bytes may be more than the bound.
            assert one.nbytes == sum(message.nbytes for message in one.messages) <= max(4, bound)


SHARED = [
    Case(make_shape(hidden_size=48), ParallelSettings(), 1, False, 8, 1),
    Case(make_shape(hidden_size=48), ParallelSettings(tensor=2), 4, False, 8, 1),
    Case(make_shape(hidden_size=48), ParallelSettings(tensor=2), 4, False, 8, 8),
    Case(make_shape(hidden_size=48, num_layers=4), ParallelSettings(tensor=2, pipeline=2), 2, False, 8, 8),
    Case(make_shape(hidden_size=48, num_layers=6), ParallelSettings(pipeline=3), 2, False, 12, 2),
    Case(make_shape(hidden_size=48, num_layers=4), ParallelSettings(pipeline=2, virtual_pipeline=2), 4, False, 8, 2),
    Case(moe_shape(hidden_size=48), ParallelSettings(expert=2), 4, False, 8, 1),
    Case(moe_shape(hidden_size=48), ParallelSettings(tensor=2, expert=2, expert_tensor=2), 2, True, 8, 8),
    Case(moe_shape(hidden_size=48), ParallelSettings(pipeline=2, expert=4, expert_tensor=1), 4, True, 16, 4),
]


@pytest.mark.parametrize("case", SHARED)
def test_equally_near_holders_share_the_sending(case, monkeypatch):
    """Of ranks that hold the same bytes, none sends more than 1.25 times its share to one kind of neighbours."""
    monkeypatch.setattr(matching, "LEAST_PART", 1)
    sent = Counter()
    for plan in case.plans():
        for one in plan.sends():
            near = case.nodes[one.source] == case.nodes[one.target]
            # Over the network all holders are equally near; within a node those of the node are.
            sent[plan.rank, ".experts." in one.source_name, case.nodes[one.source] if near else None] += one.numel
    classes = {}
    for rank in range(case.world):
        grid = case.grid(rank)
        for experts, place in (
            (False, (grid.pipeline_rank, grid.tensor_rank)),
            (True, (grid.pipeline_rank, grid.expert_rank, grid.expert_tensor_rank)),
        ):
            for where in (None, case.nodes[rank]):
                classes.setdefault((experts, place, where), []).append(sent[rank, experts, where])
    assert any(len(shares) > 1 and sum(shares) for shares in classes.values()) or case.engine == 1
    for key, shares in classes.items():
        assert max(shares) <= 1.25 * sum(shares) / len(shares), key


def test_stages_send_all_the_time():
    """Each rank begins with its own stage's layers and goes on with the next stage's: no two phases share a sender."""
    case = Case(make_shape(num_layers=8), ParallelSettings(pipeline=4), 1, False, 4, 4)
    for plan in case.plans(2000):
        origins = [one.source for one in plan.receives()]
        assert list(dict.fromkeys(origins)) == [(plan.rank + step) % 4 for step in (1, 2, 3)]
        for origin in range(4):
            layers = [int(one.target_name.split(".")[2]) for one in plan.receives()
                      if one.source == origin and ".layers." in one.target_name]  # fmt: skip
            assert layers == sorted(layers)


def test_few_tensors_are_begun_at_a_time():
    """Copies are due with what arrives, and steps end: beside the tensors of a step only what is cut is open."""
    shape = make_shape(num_layers=8, hidden_size=48)
    case = Case(shape, ParallelSettings(tensor=4), 2, False, 4, 4)
    for bucket, most in ((4000, 4), (40_000, 12)):
        for plan in case.plans(bucket):
            left = Counter(one.target_name for one in (*plan.local(), *plan.receives()))
            begun = set()
            for one in plan.rounds:
                for transfer in (*one.local, *one.arriving()):
                    left[transfer.target_name] -= 1
                    begun.add(transfer.target_name)
                begun -= {name for name in begun if not left[name]}
                assert len(begun) <= most
            assert not begun


def test_what_turns_leave_over_goes_to_different_holders():
    """Three ranks hold all and one lacks it: a tensor that is too small to be shared comes from one of them, tensors of
    different cuts from different ones."""
    weights = {
        f"w{n}": LocalTensor(f"w{n}", (n, 5), (Region(f"w{n}", ((0, n), (0, 5)), ((0, n), (0, 5))),)) for n in (4, 5, 6)
    }
    sources, targets = layout_of([weights] * 3 + [{}]), layout_of([{}] * 3 + [weights])
    plan = plan_of(3, sources, targets, [0] * 4)
    assert {one.source for one in plan.receives()} == {0, 1, 2} and len(plan.receives()) == 3


def test_large_leftovers_are_shared_by_all_holders():
    """The same with one tensor that is large: a third from each."""
    rows = 3 * matching.LEAST_PART
    weight = {"w": LocalTensor("w", (rows,), (Region("w", ((0, rows),), ((0, rows),)),))}
    plan = plan_of(3, layout_of([weight] * 3 + [{}]), layout_of([{}] * 3 + [weight]), [0] * 4)
    assert sorted((one.source, one.numel) for one in plan.receives()) == [(rank, rows // 3) for rank in range(3)]
    small = {"w": LocalTensor("w", (rows // 3 - 1,), (Region("w", ((0, rows // 3 - 1),), ((0, rows // 3 - 1),)),))}
    plan = plan_of(3, layout_of([small] * 3 + [{}]), layout_of([{}] * 3 + [small]), [0] * 4)
    assert len(plan.receives()) == 1


def test_a_rank_sends_to_the_next_then_to_the_next_but_one():
    case = Case(make_shape(), ParallelSettings(tensor=4), 1, False, 4, 4)
    for plan in case.plans():
        sends = [message.peer for one in plan.rounds for message in one.messages if not message.incoming]
        assert list(dict.fromkeys(sends)) == [(plan.rank + step) % 4 for step in (1, 2, 3)]


def test_large_boxes_travel_alone_and_small_ones_together():
    shape = make_shape(hidden_size=512, ffn_size=2048, head_dim=64, vocab_size=2000)
    case = Case(shape, ParallelSettings(pipeline=2), 1, False, 2, 2)
    messages = [message for one in case.plan(0, wire=all_in("bf16")).rounds for message in one.messages]
    assert {len(message.transfers) for message in messages} > {1}
    for message in messages:
        large = [transfer for transfer in message.transfers if transfer.nbytes >= 1 << 19]
        assert not large or len(message.transfers) == 1
        # Nothing small is left alone between large ones but what has no neighbour.
    boxes = sum(len(message.transfers) for message in messages)
    alone = sum(message.nbytes >= 1 << 19 for message in messages)
    assert alone >= 8 and len(messages) - alone < (boxes - alone) / 1.5


def test_experts_of_a_stack_are_planned_like_matrices():
    """A source with one matrix per expert fills a target that stacks them: the boxes differ in a leading dimension."""
    hf = {f"e{index}": torch.arange(index * 6, index * 6 + 6).reshape(2, 3).double() for index in range(3)}
    whole = ((0, 2), (0, 3))
    experts = {name: LocalTensor(name, (2, 3), (Region(name, whole, whole),)) for name in hf}
    sources = [{"e0": experts["e0"], "e2": experts["e2"]}, {"e1": experts["e1"]}]
    regions = tuple(Region(f"e{index}", whole, ((index, index + 1), *whole)) for index in range(3))
    targets = [{"stack": LocalTensor("stack", (3, 2, 3), regions)}] * 2
    plans = [plan_of(rank, layout_of(sources), layout_of(targets), [0, 0], None, 4) for rank in range(2)]
    filled = [blank(rank) for rank in targets]
    execute(plans, [{name: hf[name] for name in rank} for rank in sources], filled)
    assert all(torch.equal(rank["stack"], torch.stack(list(hf.values()))) for rank in filled)


ONE = Region("h", ((0, 2), (0, 3)), ((0, 2), (0, 3)))
BAD_PLANS = {
    "not covered": (
        LocalTensor("s", (1, 3), (Region("h", ((0, 1), (0, 3)), ((0, 1), (0, 3))),)),
        LocalTensor("t", (2, 3), (ONE,)),
        r"no rank holds box \(\(1, 2\), \(0, 3\)\) of h, which rank 0 needs",
    ),
    "written twice": (
        LocalTensor("s", (2, 3), (ONE,)),
        LocalTensor("t", (2, 3), (ONE, Region("h", ((0, 1), (0, 1)), ((1, 2), (2, 3))))),
        r"t on rank 0: boxes .* would both be written",
    ),
    "written twice from afar": (
        LocalTensor("s", (2, 3), ()),
        LocalTensor("t", (2, 3), (ONE, Region("h", ((0, 1), (0, 1)), ((1, 2), (2, 3))))),
        r"t on rank 0: boxes .* would both be written",
    ),
    "another name": (
        LocalTensor("s", (2, 3), (Region("other", *[((0, 2), (0, 3))] * 2),)),
        LocalTensor("t", (2, 3), (ONE,)),
        r"no rank holds any of h",
    ),
}


@pytest.mark.parametrize("case", BAD_PLANS)
def test_layouts_that_do_not_fit_are_named(case):
    source, target, message = BAD_PLANS[case]
    # Another rank has all, in the case that the rank itself has nothing.
    other = {} if source.regions else {"all": LocalTensor("all", (2, 3), (ONE,))}
    with pytest.raises(PlanError, match=message):
        plan_of(0, layout_of([{"s": source}, other]), layout_of([{"t": target}, {}]), [0, 0])


def test_a_bucket_holds_at_least_a_byte():
    with pytest.raises(ValueError, match="bucket_bytes=0"):
        Case(make_shape(), ParallelSettings(), 1, False, 1, 1).plan(0, 0)


def mixture(layers):
    """A mixture of 128 experts as large as they come, layers aside."""
    return moe_shape(
        hidden_size=4096, num_layers=layers, num_heads=64, num_kv_heads=4, head_dim=128, vocab_size=151_936,
        num_experts=128, expert_ffn_size=1536, sparse_layers=(True,) * layers,
    )  # fmt: skip


def calls(case, rank=517):
    """Python calls that planning takes, a measure of time without noise, and the number of the rank's pieces."""
    sources, targets = case.layouts()
    stages = lanes(case.parallel, case.world)
    profile = cProfile.Profile()
    plan = profile.runcall(plan_of, rank, sources, targets, case.nodes, stages, 1 << 27)
    pieces = len(plan.receives()) + len(plan.sends()) + len(plan.local())
    return sum(entry.callcount for entry in profile.getstats()), pieces


def test_planning_grows_with_the_ranks_own_pieces_alone():
    parallel = ParallelSettings(tensor=4, pipeline=8, expert=16, expert_tensor=1)
    few, few_pieces = calls(Case(mixture(8), parallel, 8, False, 1024, 8))
    many, pieces = calls(Case(mixture(32), parallel, 8, False, 1024, 8))
    assert pieces > 3.5 * few_pieces and many / few <= 1.05 * pieces / few_pieces
    twice, more = calls(Case(mixture(32), parallel, 8, False, 2048, 8))
    assert twice / many <= 1.2 * more / pieces
