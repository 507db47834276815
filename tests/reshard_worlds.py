"""Test helpers: random worlds of a policy and its engines, and plans executed in one process, round by round."""

from collections import defaultdict, deque
from dataclasses import dataclass, replace

import torch
from hypothesis import assume
from hypothesis import strategies as st
from reshard_reference import make_shape, shapes

from megarl.config import block_rules
from megarl.config.grid import grid_of_rank
from megarl.config.model_shape import ModelShape
from megarl.config.schema import RunConfig
from megarl.config.sections import ParallelSettings
from megarl.config.splits import engine_refusals, policy_refusals
from megarl.reshard.copying import box_view, copy_box
from megarl.reshard.fp8_map import in_parts, local_scales, quantised_weights, with_scales
from megarl.reshard.layout import Place, Split, Spread
from megarl.reshard.model_layouts import engine_layout, lanes, policy_layout
from megarl.reshard.plan import make_plan
from megarl.reshard.weight_map import megatron_tensors, vllm_tensors
from megarl.reshard.wire import BYTES, all_in

#: An element is a byte.
ONE_BYTE = all_in("e4m3")


@dataclass(frozen=True)
class Case:
    """A model, the policy's layout of it, engines of `engine` ranks, on `world` ranks, `per_node` to a node. `fp8`: the
    engines have it in FP8."""

    shape: ModelShape
    parallel: ParallelSettings
    engine: int
    expert_parallel: bool
    world: int
    per_node: int
    fp8: bool = False

    @property
    def quantised(self):
        return quantised_weights(self.shape) if self.fp8 else ()

    @property
    def nodes(self):
        return [rank // self.per_node for rank in range(self.world)]

    def grid(self, rank):
        return grid_of_rank(rank, self.world, self.parallel)

    def policy(self, rank):
        return megatron_tensors(self.shape, self.parallel, self.grid(rank))

    def engine_of(self, rank):
        return local_scales(self.plain_engine_of(rank), self.quantised)

    def plain_engine_of(self, rank):
        return vllm_tensors(
            self.shape, tensor=self.engine, tensor_rank=rank % self.engine, expert_parallel=self.expert_parallel
        )

    def config(self):
        """Settings of such a run."""
        rollout = {"precision": "fp8", "tensor": self.engine, "expert_parallel": self.expert_parallel}
        return RunConfig.model_validate(
            {
                "name": "test",
                "steps": 1,
                "model": {"path": "model"},
                "algorithm": {"name": "grpo"},
                "data": {"path": "unused"},
                "parallel": self.parallel.model_dump(),
                "rollout": rollout,
            }
        )

    def layouts(self):
        sources = policy_layout(self.shape, self.parallel, self.world)
        targets = engine_layout(self.shape, tensor=self.engine, world=self.world, expert_parallel=self.expert_parallel)
        return in_parts(sources, self.quantised), with_scales(targets, self.quantised)

    def plan(self, rank, bucket_bytes=10**9, wire=ONE_BYTE):
        return plan_of(rank, *self.layouts(), self.nodes, lanes(self.parallel, self.world), bucket_bytes, wire)

    def plans(self, bucket_bytes=10**9, wire=ONE_BYTE):
        return [self.plan(rank, bucket_bytes, wire) for rank in range(self.world)]


def plan_of(rank, sources, targets, nodes, lane_of_rank=None, bucket_bytes=10**9, wire=ONE_BYTE):
    return make_plan(
        rank,
        sources,
        targets,
        node_of_rank=nodes,
        lane_of_rank=lane_of_rank or [0] * len(nodes),
        bucket_bytes=bucket_bytes,
        wire=wire,
    )


def moe_shape(family="qwen3_moe", **changes):
    """A tiny mixture: 4 experts of 8 in every layer, 2 layers."""
    fields = {"num_experts": 4, "experts_per_token": 2, "expert_ffn_size": 8, "sparse_layers": (True, True)}
    fields |= {"shared_expert_ffn_size": 8} if family == "qwen2_moe" else {}
    fields |= {"qkv_bias": family == "qwen2_moe", "qk_norm": family == "qwen3_moe"}
    return replace(make_shape("llama"), family=family, **(fields | changes))


@st.composite
def mixtures(draw):
    layers = draw(st.sampled_from([2, 4]))
    family = draw(st.sampled_from(["qwen2_moe", "qwen3_moe", "mixtral"]))
    sparse = (*(family == "mixtral" or draw(st.booleans()) for _ in range(layers - 1)), True)
    return moe_shape(
        family,
        num_layers=layers,
        sparse_layers=sparse,
        num_experts=draw(st.sampled_from([4, 8])),
        num_kv_heads=draw(st.sampled_from([1, 2, 4])),
        tied_embeddings=draw(st.booleans()),
        vocab_size=draw(st.integers(1, 300)),
    )


@st.composite
def cases(draw, models=None):
    """Grids of TP, PP, VPP, uneven stages, CP, EP, ETP and DP up to 8 ranks, with engines of every size they allow."""
    shape = draw(st.one_of(shapes(), mixtures()) if models is None else models)
    world = draw(st.sampled_from([1, 2, 3, 4, 6, 8]))
    divisors = [n for n in range(1, world + 1) if world % n == 0]
    tensor = draw(st.sampled_from(divisors))
    pipeline = draw(st.sampled_from([n for n in divisors if (world // tensor) % n == 0]))
    context = draw(st.sampled_from([n for n in divisors if (world // tensor // pipeline) % n == 0]))
    settings = {"tensor": tensor, "pipeline": pipeline, "context": context}
    if shape.is_moe:
        expert = draw(st.sampled_from([n for n in divisors if shape.num_experts % n == 0]))
        settings |= {"expert": expert, "expert_tensor": draw(st.sampled_from(divisors))}
        assume((world // pipeline) % (expert * settings["expert_tensor"]) == 0)
    virtual = draw(st.sampled_from([1, 2])) if pipeline > 1 else 1
    chunks = pipeline * virtual
    assume(shape.num_layers >= chunks)
    if virtual > 1:
        settings["virtual_pipeline"] = virtual
    if shape.num_layers % chunks or draw(st.booleans()):
        counts = [1] * chunks
        for _ in range(shape.num_layers - chunks):
            counts[draw(st.integers(0, chunks - 1))] += 1
        settings["stage_layers"] = tuple(counts)
    parallel = ParallelSettings(**settings)
    engine, expert_parallel = draw(st.sampled_from(divisors)), shape.is_moe and draw(st.booleans())
    assume(not list(policy_refusals(shape, parallel)))
    assume(not list(engine_refusals(shape, engine, expert_parallel)))
    return Case(shape, parallel, engine, expert_parallel, world, draw(st.sampled_from([1, 2, 3, 4, 8])))


@st.composite
def blocky(draw, fitting):
    """Models whose matrices have blocks; `fitting`: of so many rows that cuts may fall between blocks."""
    sizes = {
        "hidden_size": draw(st.sampled_from([130, 256])),
        "num_heads": draw(st.sampled_from([4, 8])),
        "head_dim": draw(st.sampled_from([64, 128] if fitting else [32, 64, 96, 128])),
        "ffn_size": draw(st.sampled_from([256, 512] if fitting else [200, 256, 384, 512])),
        "num_layers": draw(st.sampled_from([2, 4])),
        "vocab_size": draw(st.integers(1, 100)),
    }
    sizes["num_kv_heads"] = draw(st.sampled_from([n for n in (1, 2, 4, 8) if n <= sizes["num_heads"]]))
    if draw(st.booleans()):
        return make_shape(draw(st.sampled_from(["llama", "qwen2", "qwen3"])), **sizes)
    family = draw(st.sampled_from(["qwen2_moe", "qwen3_moe", "mixtral"]))
    sizes |= {"expert_ffn_size": draw(st.sampled_from([128, 256])), "num_experts": 4}
    sizes |= {"shared_expert_ffn_size": 256} if family == "qwen2_moe" else {}
    dense = family != "mixtral" and draw(st.booleans())
    return moe_shape(family, **sizes, sparse_layers=(*(not dense for _ in range(sizes["num_layers"] - 1)), True))


@st.composite
def fp8_cases(draw, fitting=True):
    """As `cases`, with engines in FP8; `fitting`: only those that are not refused."""
    case = replace(draw(cases(blocky(fitting))), fp8=True)
    assume(not fitting or not list(block_rules.refusals(case.config(), case.shape)))
    return case


def layout_of(ranks):
    """The layout of given tensors, one mapping per rank, in order of appearance."""
    found = {}
    for rank, tensors in enumerate(ranks):
        for name, tensor in tensors.items():
            for region in tensor.regions:
                leading = len(region.local_box) - len(region.hf_box)
                index = tuple(start for start, _ in region.local_box[:leading])
                places = found.setdefault((region.hf_name, name, index), {})
                places.setdefault((region.hf_box, region.local_box[leading:]), []).append(rank)
    splits, layout = {}, {}
    for (hf_name, name, index), boxes in found.items():
        places = tuple(Place(tuple(owners), *pair) for pair, owners in boxes.items())
        layout.setdefault(hf_name, []).append(Spread(name, index, splits.setdefault(places, Split(places))))
    return layout


def execute(plans, sources, targets):
    """Run the plans of all ranks as the mover does, a round posted before the one before it is waited for.

    `sources`: tensors by rank and name, `targets` likewise, filled in place: what is written must hold -1 before.
    Messages between two ranks match in the order in which both post them. Fails where ranks wait for each other.
    """
    posted = defaultdict(int)
    landed = defaultdict(int)
    queues = defaultdict(deque)
    counts = defaultdict(int)
    due = {}
    while any(landed[plan.rank] < len(plan.rounds) for plan in plans):
        progress = False
        for plan in plans:
            rank = plan.rank
            if posted[rank] < min(len(plan.rounds), landed[rank] + 2):
                waits = []
                for message in plan.rounds[posted[rank]].messages:
                    pair = (message.peer, rank) if message.incoming else (rank, message.peer)
                    if not message.incoming:
                        queues[pair].append(message)
                    counts[rank, pair] += 1
                    waits.append((message, pair, counts[rank, pair]))
                due[rank, posted[rank]] = waits
                posted[rank] += 1
                progress = True
            elif landed[rank] < posted[rank]:
                waits = due[rank, landed[rank]]
                if all(counts[message.peer, pair] >= number for message, pair, number in waits):
                    _land(plan.rounds[landed[rank]], queues, rank, sources, targets)
                    landed[rank] += 1
                    progress = True
        assert progress, "all ranks wait"
    assert not any(queues.values())


def execute_in_calls(plans):
    """Run all ranks' turns as NCCL may at worst: one call after another, each until all its messages are through.

    A message is through when both its ranks are in the calls that have it. Fails where ranks wait for each other.
    """
    calls = {}
    for plan in plans:
        numbers, turns = defaultdict(int), {}
        for place, message in ((place, message) for place, one in enumerate(plan.rounds) for message in one.messages):
            pair = (message.peer, plan.rank) if message.incoming else (plan.rank, message.peer)
            # A turn that falls into two rounds is two calls.
            turns.setdefault((message.turn, place), []).append((*pair, numbers[pair]))
            numbers[pair] += 1
        assert list(turns) == sorted(turns)
        # At most one message out and one in.
        assert all(len({source == plan.rank for source, *_ in call}) == len(call) for call in turns.values())
        calls[plan.rank] = deque(map(set, turns.values()))
    while any(calls.values()):
        through = [
            (source, target, number)
            for rank, queue in calls.items()
            for source, target, number in (queue[0] if queue else ())
            if rank == source and calls[target] and (source, target, number) in calls[target][0]
        ]
        assert through, "all ranks wait"
        for source, target, number in through:
            for rank in (source, target):
                calls[rank][0].discard((source, target, number))
        for queue in calls.values():
            while queue and not queue[0]:
                queue.popleft()


def _land(one, queues, rank, sources, targets):
    for transfer in one.local:
        assert transfer.source == transfer.target == rank
        _write(transfer, sources, targets)
    for message in one.messages:
        if message.incoming:
            sent = queues[message.peer, rank].popleft()
            assert sent.transfers == message.transfers and sent.nbytes == message.nbytes
            ends = [0, *(stop for _, _, stop in message.spans())]
            assert ends[-1] == message.nbytes
            for (transfer, start, stop), before in zip(message.spans(), ends, strict=False):
                assert stop - start == transfer.nbytes and start % BYTES[transfer.kind] == 0
                assert 0 <= start - before < BYTES[transfer.kind]
            for transfer in message.transfers:
                assert (transfer.source, transfer.target) == (message.peer, rank)
                _write(transfer, sources, targets)


def _write(transfer, sources, targets):
    target = targets[transfer.target][transfer.target_name]
    assert (box_view(target, transfer.target_box) == -1).all(), f"{transfer} writes twice"
    copy_box(target, transfer.target_box, sources[transfer.source][transfer.source_name], transfer.source_box)


def blank(tensors):
    """Tensors of a rank in which nothing is written: -1."""
    return {name: torch.full(tensor.shape, -1.0, dtype=torch.float64) for name, tensor in tensors.items()}
