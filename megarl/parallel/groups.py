"""Megatron's process groups for a run's parallel layout; the only place that initialises them."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core import parallel_state, tensor_parallel

from megarl.config.sections import ParallelSettings


@dataclass(frozen=True, slots=True)
class Grid:
    """This rank's coordinates and the sizes of the grid, in Megatron's rank order (tp-cp-ep-dp-pp)."""

    tensor: int
    pipeline: int
    data: int
    tensor_rank: int
    pipeline_rank: int
    data_rank: int

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline - 1

    @property
    def reports(self) -> bool:
        """Whether this rank contributes its replica's loss and metrics: one rank per data-parallel replica."""
        return self.is_last_stage and self.tensor_rank == 0


def form_grid(parallel: ParallelSettings, seed: int) -> Grid:
    """Initialise Megatron's groups over the default process group and seed its random states."""
    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            context_parallel_size=parallel.context,
        )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return Grid(
        tensor=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline=parallel_state.get_pipeline_model_parallel_world_size(),
        data=parallel_state.get_data_parallel_world_size(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        data_rank=parallel_state.get_data_parallel_rank(),
    )


def dissolve_grid() -> None:
    """Take Megatron's groups down, so that another layout can be formed in the same processes (tests)."""
    parallel_state.destroy_model_parallel()


def grid_of_rank(rank: int, world: int, parallel: ParallelSettings) -> tuple[int, int, int]:
    """(tensor_rank, data_rank, pipeline_rank) of any rank, without communication; tensor varies fastest."""
    data = world // (parallel.tensor * parallel.pipeline * parallel.context)
    tensor_rank = rank % parallel.tensor
    data_rank = (rank // (parallel.tensor * parallel.context)) % data
    pipeline_rank = rank // (parallel.tensor * parallel.context * data)
    return tensor_rank, data_rank, pipeline_rank
