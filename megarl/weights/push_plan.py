"""The plan of a run's weight push, from its settings: the layouts that it goes between, and a rank's part in it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from megarl.config.grid import Grid
from megarl.config.model_shape import ModelShape
from megarl.config.schema import RunConfig
from megarl.reshard.boxes import LocalTensor
from megarl.reshard.fp8_map import (
    in_parts,
    local_parts,
    local_scales,
    quantised_weights,
    quantised_wire,
    with_scales,
)
from megarl.reshard.layout import Layout
from megarl.reshard.model_layouts import engine_layout, lanes, policy_layout
from megarl.reshard.plan import Plan, make_plan
from megarl.reshard.weight_map import megatron_tensors, vllm_tensors
from megarl.reshard.wire import Wire


def push_layouts(config: RunConfig, shape: ModelShape, world: int) -> tuple[Layout, Layout]:
    """Where every tensor lies on all `world` ranks: the policy's shards, and the engines' tensors."""
    rollout = config.rollout
    engines = engine_layout(shape, tensor=rollout.tensor, world=world, expert_parallel=rollout.expert_parallel)
    policy = policy_layout(shape, config.parallel, world)
    weights = weights_in_fp8(config, shape)
    return in_parts(policy, weights), with_scales(engines, weights)


def weights_in_fp8(config: RunConfig, shape: ModelShape) -> Collection[str]:
    """The checkpoint's weights that the engines have in FP8."""
    return quantised_weights(shape) if config.rollout.precision == "fp8" else ()


def push_plan(config: RunConfig, shape: ModelShape, rank: int, node_of_rank: Sequence[int]) -> Plan:
    """A rank's part in the push."""
    sources, targets = push_layouts(config, shape, len(node_of_rank))
    return make_plan(
        rank,
        sources,
        targets,
        node_of_rank=node_of_rank,
        lane_of_rank=lanes(config.parallel, len(node_of_rank)),
        bucket_bytes=int(config.weights.bucket_mib * 2**20),
        wire=push_wire(config, shape),
    )


def push_wire(config: RunConfig, shape: ModelShape) -> Wire:
    """In which types weights go to the engines."""
    return quantised_wire(weights_in_fp8(config, shape), config.engine_dtype)


def engine_tensors(config: RunConfig, shape: ModelShape, rank: int) -> dict[str, LocalTensor]:
    """The engine's tensors on a rank, as the plan sees them."""
    rollout = config.rollout
    tensors = vllm_tensors(
        shape, tensor=rollout.tensor, tensor_rank=rank % rollout.tensor, expert_parallel=rollout.expert_parallel
    )
    return local_scales(tensors, weights_in_fp8(config, shape))


def policy_tensors(config: RunConfig, shape: ModelShape, grid: Grid) -> dict[str, LocalTensor]:
    """The policy's tensors on a rank as they are sent, as the plan sees them."""
    return local_parts(megatron_tensors(shape, config.parallel, grid), weights_in_fp8(config, shape))
