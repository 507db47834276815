"""Delayed scaling's state in Transformer Engine's layers, so that checkpoints have it: factors and histories of amaxes.

The layers themselves would hand it out pickled, as extra state (`get_extra_state`), and Megatron's sharded state keeps
that of one replica and of the first tensor-parallel rank alone. But replicas have amaxes of their own, as each enters
its own micro-batches, and so has every rank in a history's first row, which waits for the next reduction. So each rank
saves its own here, as tensors, and gets them back under the layout that they were saved under.

Transformer Engine makes a layer's state in its first pass, and from then on each pass of whichever model enters a row
into it. Here all layers have it from the beginning: a run that is resumed enters what the run before would.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.models.gpt import GPTModel

from megarl.config.grid import Grid

#: Transformer Engine's names of the state of inputs, weights and outputs, and of gradients.
_DIRECTIONS = ("scaling_fwd", "scaling_bwd")


class DelayedScaling:
    """The state of all layers of a model's chunks, made here: factors of 1 and no amaxes. `config` is Megatron's.

    `tensors` by their keys in a checkpoint: of each layer and direction a history (H, n), H its length and n how many
    matrices are scaled, and factors (n,). They may only be written in place: quantisation and reductions hold views.
    """

    def __init__(self, chunks: Sequence[GPTModel], config: Any, grid: Grid) -> None:
        from transformer_engine.pytorch.quantization import (  # pyright: ignore[reportMissingImports]
            FP8GlobalStateManager,
        )

        self._grid = grid
        self.tensors: dict[str, torch.Tensor] = {}
        # With gradients the end of the context would enter a row.
        with torch.no_grad(), get_fp8_context(config):
            for name, layer in _layers(chunks):
                layer.init_fp8_metadata(num_gemms=getattr(layer, "num_gemms", 1))
                FP8GlobalStateManager.add_fp8_tensors_to_global_buffer(layer.fp8_meta)
                for direction in _DIRECTIONS:
                    state = layer.fp8_meta[direction]
                    self.tensors[f"{name}.{direction}.history"] = state.amax_history
                    self.tensors[f"{name}.{direction}.factors"] = state.scale

    def begin_anew(self) -> None:
        """Drop all amaxes, and scale by 1 again."""
        for name, tensor in self.tensors.items():
            tensor.fill_(1.0 if name.endswith(".factors") else 0.0)

    def sharded(self) -> dict[str, ShardedTensor]:
        """What a checkpoint has of them, with a place for every rank of a pipeline stage: in front of each shape
        data-, context- and tensor-parallel ranks."""
        grid = self._grid
        places = (
            (0, grid.data_rank, grid.data),
            (1, grid.context_rank, grid.context),
            (2, grid.tensor_rank, grid.tensor),
        )
        return {
            name: ShardedTensor.from_rank_offsets(name, tensor, *places, prepend_axis_num=len(places))
            for name, tensor in self.tensors.items()
        }

    def load(self, found: Mapping[str, torch.Tensor]) -> None:
        """Take over what `found` has of them."""
        for name, tensor in found.items():
            self.tensors[name].copy_(tensor)


def _layers(chunks: Sequence[GPTModel]) -> Iterator[tuple[str, Any]]:
    """Transformer Engine's linear layers by name, decoder layers counted over the whole model."""
    from transformer_engine.pytorch import (  # pyright: ignore[reportMissingImports]
        GroupedLinear,
        LayerNormLinear,
        Linear,
    )

    for chunk in chunks:
        layers: Any = chunk.decoder.layers
        for layer in layers:
            for name, module in layer.named_modules():
                if isinstance(module, Linear | LayerNormLinear | GroupedLinear):
                    # Megatron counts layers from 1.
                    yield f"decoder.layers.{layer.layer_number - 1}.{name}", module
