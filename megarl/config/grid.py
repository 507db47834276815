"""Where each rank stands in Megatron's grid, and which layers it has. Pure and torch-free.

Megatron numbers ranks twice: for everything but the experts in the order tensor, context, data, pipeline, and for the
experts in the order expert tensor, expert, expert data, pipeline; the first varies fastest. Pipeline stages are the
same in both.
"""

from __future__ import annotations

from dataclasses import dataclass

from megarl.config.sections import ParallelSettings
from megarl.config.wording import divisors
from megarl.errors import Refusal


@dataclass(frozen=True, slots=True)
class Grid:
    """Sizes of the grid and one rank's coordinates in it; a size left out is 1."""

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    data: int = 1
    expert: int = 1
    expert_tensor: int = 1
    tensor_rank: int = 0
    pipeline_rank: int = 0
    context_rank: int = 0
    data_rank: int = 0
    expert_rank: int = 0
    expert_tensor_rank: int = 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline - 1

    @property
    def experts_span_replicas(self) -> bool:
        """Whether ranks of several data-parallel replicas hold a layer's experts together."""
        return self.expert * self.expert_tensor > self.tensor * self.context

    @property
    def reports(self) -> bool:
        """Whether this rank contributes its replica's loss and metrics: one rank per data-parallel replica."""
        return self.is_last_stage and self.tensor_rank == 0 and self.context_rank == 0


def grid_of_rank(rank: int, world: int, parallel: ParallelSettings) -> Grid:
    """The place of any rank among `world`, without communication."""
    tensor, context, pipeline = parallel.tensor, parallel.context, parallel.pipeline
    expert, expert_tensor = parallel.expert, parallel.expert_tensor or tensor
    stage = world // pipeline
    place = rank % stage
    return Grid(
        tensor=tensor,
        pipeline=pipeline,
        context=context,
        data=stage // (tensor * context),
        expert=expert,
        expert_tensor=expert_tensor,
        tensor_rank=place % tensor,
        pipeline_rank=rank // stage,
        context_rank=place // tensor % context,
        data_rank=place // (tensor * context),
        expert_rank=place // expert_tensor % expert,
        expert_tensor_rank=place % expert_tensor,
    )


def sequence_multiple(context: int) -> int:
    """What context parallelism pads each sequence to a multiple of: it cuts sequences into 2 x `context` pieces."""
    return 1 if context == 1 else 2 * context


def padded_length(tokens: int, context: int) -> int:
    """Tokens that a sequence of so many takes in a micro-batch."""
    multiple = sequence_multiple(context)
    return -(-tokens // multiple) * multiple


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of the model that one rank runs in one piece: consecutive layers, and what stands at the model's ends."""

    layers: range
    first: bool
    last: bool


def chunks_of_stage(num_layers: int, parallel: ParallelSettings, pipeline_rank: int) -> tuple[Chunk, ...]:
    """The model chunks of a pipeline stage: one, or `parallel.virtual_pipeline` under the interleaved schedule.

    Chunk c of the forward pass is on stage c modulo `parallel.pipeline`. Raises `Refusal` like `layers_of_chunks`.
    """
    counts = layers_of_chunks(num_layers, parallel)
    starts = [sum(counts[:index]) for index in range(len(counts))]
    return tuple(
        Chunk(range(starts[index], starts[index] + counts[index]), index == 0, index == len(counts) - 1)
        for index in range(pipeline_rank, len(counts), parallel.pipeline)
    )


def layers_of_chunks(num_layers: int, parallel: ParallelSettings) -> tuple[int, ...]:
    """Number of layers of every model chunk, in the order of the forward pass.

    `parallel.stage_layers`, or equal shares, in which the embedding, the loss, or both may count as a layer. Raises
    `Refusal` where the layers do not fit the chunks.
    """
    virtual = parallel.virtual_pipeline or 1
    chunks = parallel.pipeline * virtual
    product = "parallel.pipeline" if virtual == 1 else "parallel.pipeline x parallel.virtual_pipeline"
    if virtual > 1 and parallel.pipeline == 1:
        raise Refusal(
            f"parallel.virtual_pipeline={virtual}",
            "needs parallel.pipeline > 1",
            "set parallel.pipeline to 2 or more, or remove parallel.virtual_pipeline",
        )
    if parallel.stage_layers is not None:
        _check_stage_layers(num_layers, parallel, chunks, product)
        return parallel.stage_layers
    counted = num_layers + parallel.account_for_embedding + parallel.account_for_loss
    if counted % chunks:
        further = " (embedding or loss counted)" if counted > num_layers else ""
        raise Refusal(
            f"{product}={chunks}",
            f"must divide the model's {counted} layers{further}",
            f"use {divisors(counted)}, or write the layers of each stage as parallel.stage_layers",
        )
    counts = [counted // chunks] * chunks
    counts[0] -= parallel.account_for_embedding
    counts[-1] -= parallel.account_for_loss
    if min(counts) < 1:
        raise Refusal(
            f"{product}={chunks}",
            f"leaves a stage without a layer: {', '.join(map(str, counts))}",
            "use fewer stages, or do not count the embedding or the loss as a layer",
        )
    return tuple(counts)


def _check_stage_layers(num_layers: int, parallel: ParallelSettings, chunks: int, product: str) -> None:
    layers = parallel.stage_layers or ()
    value = f"parallel.stage_layers={list(layers)}"
    if parallel.account_for_embedding or parallel.account_for_loss:
        raise Refusal(
            value,
            "says each stage's layers already",
            "remove parallel.account_for_embedding and parallel.account_for_loss",
        )
    if len(layers) != chunks:
        raise Refusal(value, f"must have {product} = {chunks} numbers", f"write {chunks} numbers")
    if sum(layers) != num_layers:
        raise Refusal(
            value, f"must add up to the model's {num_layers} layers, not {sum(layers)}", "correct the numbers"
        )
