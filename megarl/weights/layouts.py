"""The layouts that plans go between, as lists by rank: the policy's shards and the engines' tensors."""

from __future__ import annotations

from megarl.config.grid import grid_of_rank
from megarl.config.model_shape import ModelShape
from megarl.config.schema import RunConfig
from megarl.config.sections import ParallelSettings
from megarl.reshard.boxes import LocalTensor
from megarl.reshard.weight_map import megatron_tensors, vllm_tensors


def policy_tensors(parallel: ParallelSettings, shape: ModelShape, world_size: int) -> list[dict[str, LocalTensor]]:
    """The policy's tensors on every rank."""
    return [megatron_tensors(shape, parallel, grid_of_rank(rank, world_size, parallel)) for rank in range(world_size)]


def engine_tensors(config: RunConfig, shape: ModelShape, rank: int) -> dict[str, LocalTensor]:
    """The engine's tensors on a rank, as the plan sees them."""
    tensor = config.rollout.tensor
    return vllm_tensors(shape, tensor=tensor, tensor_rank=rank % tensor)
