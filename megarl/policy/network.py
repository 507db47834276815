"""This rank's shard of a model with its adapter, and what runs it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

from megarl.config.grid import Grid, chunks_of_stage
from megarl.config.implied import Implied
from megarl.config.model_shape import ModelShape
from megarl.config.schema import RunConfig
from megarl.parallel.bootstrap import World
from megarl.policy import digest
from megarl.policy.adapter import Adapter
from megarl.policy.megatron_config import transformer_config
from megarl.policy.model import build_model, wrap_data_parallel
from megarl.policy.passes import Passes
from megarl.reshard.weight_map import chunk_prefix


class Network:
    """A model's chunks, and the passes over them.

    `trained` are the modules whose parameters train: the chunks, or beside frozen ones the adapter; `wrapped` are these
    with their gradient buffers.
    """

    def __init__(self, config: RunConfig, shape: ModelShape, world: World, grid: Grid) -> None:
        # Each has a record of its own: Megatron keeps in it how an optimizer scales losses.
        self.megatron_config: Any = transformer_config(config, shape)
        stages = chunks_of_stage(shape.num_layers, config.parallel, grid.pipeline_rank)
        self.chunks = build_model(self.megatron_config, shape, stages)
        self.adapter: Adapter | None = None
        if (settings := Implied(config).adapter) is not None:
            self.adapter = Adapter(settings, shape, config.parallel, grid, self.chunks, config.seed)
            _freeze(self.chunks)
        self.trained: list[Any] = [*self.chunks] if self.adapter is None else [self.adapter]
        self.wrapped: Any = wrap_data_parallel(config, self.megatron_config, self.trained)
        running = self.wrapped if self.adapter is None else self.chunks
        self.passes = Passes(config, self.megatron_config, shape, world, grid, self.chunks, running, self.adapter)

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """The shard of the base's weights, in the names of `megatron_tensors`: Megatron's, with a prefix where chunks
        are several."""
        for number, chunk in enumerate(self.chunks):
            prefix = chunk_prefix(number, len(self.chunks))
            yield from ((prefix + name, parameter) for name, parameter in chunk.named_parameters())

    def base_digest(self) -> str:
        """Sums of bits of a frozen base's weights, the same under every layout. Collective."""
        return digest.of_frozen(parameter for _, parameter in self.named_parameters())

    def trained_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Those that train, by name."""
        yield from self.named_parameters() if self.adapter is None else self.adapter.named_parameters()

    def parameters(self) -> list[torch.nn.Parameter]:
        """All that the model computes with: the base's, then the adapter's."""
        base = [parameter for _, parameter in self.named_parameters()]
        return base if self.adapter is None else [*base, *self.adapter.parameters()]


def _freeze(chunks: Sequence[GPTModel]) -> None:
    for chunk in chunks:
        chunk.requires_grad_(False)
        if chunk.pre_process:
            # What recomputes layers has gradients only where what goes in has one, and the schedule of a pipeline
            # where what comes out has.
            chunk.embedding.register_forward_hook(_with_gradient)


def _with_gradient(module: torch.nn.Module, arguments: Any, output: torch.Tensor) -> torch.Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() else output
