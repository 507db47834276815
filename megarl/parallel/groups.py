"""Megatron's process groups for a run's parallel layout; the only place that initialises them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megarl.config.grid import Grid, grid_of_rank
from megarl.config.sections import ParallelSettings
from megarl.errors import MegarlError
from megarl.parallel.cpu_platform import has_cuda


def form_grid(parallel: ParallelSettings, seed: int, *, backend: str | None = None) -> Grid:
    """Initialise Megatron's groups over the default process group and seed its random states.

    `backend`: what they communicate by; None: NCCL where there is a GPU, else what the default group has.
    Raises `MegarlError` where Megatron places this rank elsewhere than `grid_of_rank`, on which plans rest.
    """
    if not parallel_state.is_initialized():
        virtual = parallel.virtual_pipeline or 1
        with _groups_over(backend or ("nccl" if has_cuda() else None)):
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=parallel.tensor,
                pipeline_model_parallel_size=parallel.pipeline,
                virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
                context_parallel_size=parallel.context,
                expert_model_parallel_size=parallel.expert,
                expert_tensor_parallel_size=parallel.expert_tensor,
                create_gloo_process_groups=False,
            )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    grid, found = grid_of_rank(dist.get_rank(), dist.get_world_size(), parallel), _grid_of_megatron()
    if grid != found:
        raise MegarlError(f"Megatron places this rank at {found}, expected {grid}")
    return grid


@contextmanager
def _groups_over(backend: str | None) -> Iterator[None]:
    """Inside, groups for which Megatron names no backend have this one.

    They would take after the default group, which on a GPU has gloo beside NCCL: every rank would keep a connection to
    every other one of each group for tensors on the host, of which it has none.
    """
    state: Any = parallel_state
    original = state.create_group

    def create_group(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs | {"backend": kwargs.get("backend") or backend})

    state.create_group = create_group
    try:
        yield
    finally:
        state.create_group = original


def _grid_of_megatron() -> Grid:
    state: Any = parallel_state
    return Grid(
        tensor=state.get_tensor_model_parallel_world_size(),
        pipeline=state.get_pipeline_model_parallel_world_size(),
        context=state.get_context_parallel_world_size(),
        data=state.get_data_parallel_world_size(),
        expert=state.get_expert_model_parallel_world_size(),
        expert_tensor=state.get_expert_tensor_parallel_world_size(),
        tensor_rank=state.get_tensor_model_parallel_rank(),
        pipeline_rank=state.get_pipeline_model_parallel_rank(),
        context_rank=state.get_context_parallel_rank(),
        data_rank=state.get_data_parallel_rank(),
        expert_rank=state.get_expert_model_parallel_rank(),
        expert_tensor_rank=state.get_expert_tensor_parallel_rank(),
    )


def dissolve_grid() -> None:
    """Take Megatron's groups down, so that another layout can be formed in the same processes (tests)."""
    parallel_state.destroy_model_parallel()
