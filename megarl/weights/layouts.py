"""The layouts that a run's pushes go between: the policy's shards and the engines' tensors."""

from __future__ import annotations

from megarl.config.model_shape import ModelShape
from megarl.config.schema import RunConfig
from megarl.reshard.boxes import LocalTensor
from megarl.reshard.layout import Layout
from megarl.reshard.model_layouts import engine_layout, policy_layout
from megarl.reshard.weight_map import vllm_tensors


def push_layouts(config: RunConfig, shape: ModelShape, world: int) -> tuple[Layout, Layout]:
    """Where every tensor lies on all `world` ranks before and after a push."""
    rollout = config.rollout
    engines = engine_layout(shape, tensor=rollout.tensor, world=world, expert_parallel=rollout.expert_parallel)
    return policy_layout(shape, config.parallel, world), engines


def engine_tensors(config: RunConfig, shape: ModelShape, rank: int) -> dict[str, LocalTensor]:
    """The engine's tensors on a rank, as plans see them."""
    rollout = config.rollout
    return vllm_tensors(
        shape, tensor=rollout.tensor, tensor_rank=rank % rollout.tensor, expert_parallel=rollout.expert_parallel
    )
