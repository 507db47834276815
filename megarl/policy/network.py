"""This rank's shard of a model with its adapter, and what runs it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from megatron.core.models.gpt import GPTModel

from megarl import records
from megarl.config.fp8 import DELAYED
from megarl.config.grid import Grid, chunks_of_stage
from megarl.config.implied import Implied
from megarl.config.influence import InfluenceSettings
from megarl.config.model_shape import ModelShape
from megarl.config.schema import RunConfig
from megarl.parallel.bootstrap import World
from megarl.parallel.cpu_platform import has_cuda
from megarl.policy import digest
from megarl.policy.adapter import Adapter, Attachment
from megarl.policy.batch import MicroBatch, apart
from megarl.policy.delayed_scaling import DelayedScaling
from megarl.policy.fp8_linear import scalings
from megarl.policy.influence import InfluenceTap
from megarl.policy.losses import LossStage, Pass, joined
from megarl.policy.megatron_config import transformer_config
from megarl.policy.model import build_model, fuse_weight_gradients, wrap_data_parallel
from megarl.policy.passes import Passes
from megarl.reshard.weight_map import chunk_prefix


@dataclass(frozen=True, slots=True)
class Survey:
    """What a pass without a gradient finds of each sequence.

    log_probs, entropies: of its trained tokens, float32 (T,), in nats; of nothing but on the last pipeline stage.
    influences: of its steps, float32 (S,), on all ranks of the replica (see `megarl.policy.influence`); empty where no
    steps were given.
    """

    log_probs: list[np.ndarray]
    entropies: list[np.ndarray]
    influences: list[np.ndarray]
    influence_seconds: float = 0.0
    """This rank's time in listening to attention."""


class Network:
    """A model's chunks, its adapter, which may be another network's too, and the passes over them.

    `wrapped` are the chunks with their gradient buffers, none where the base is frozen; `attachment` is the adapter's
    hold on them; `delayed_scaling` is that of Transformer Engine's layers, None under other recipes and on the CPU,
    whose layers keep it themselves (`megarl.policy.fp8_linear`).
    """

    def __init__(
        self, config: RunConfig, shape: ModelShape, world: World, grid: Grid, adapter: Adapter | None = None
    ) -> None:
        implied = Implied(config)
        # Each has a record of its own: Megatron keeps in it how an optimizer scales losses.
        self.megatron_config: Any = transformer_config(config, shape)
        self._stages = chunks_of_stage(shape.num_layers, config.parallel, grid.pipeline_rank)
        self.chunks = build_model(self.megatron_config, shape, self._stages)
        self._rounds_weights = config.fp8.param and not has_cuda()
        if not has_cuda():
            from megarl.policy.fp8_layers import use_fp8

            use_fp8(self.chunks, config, shape.num_layers)
        self.delayed_scaling: DelayedScaling | None = None
        if config.precision == DELAYED and has_cuda():
            self.delayed_scaling = DelayedScaling(self.chunks, self.megatron_config, grid)
        if adapter is None and implied.adapter is not None:
            adapter = Adapter(implied.adapter, shape, config.parallel, grid, self.chunks, config.seed)
        self.adapter = adapter
        self.attachment: Attachment | None = None if adapter is None else adapter.attached(self.chunks)
        self.wrapped: list[Any] = []
        if implied.base_is_frozen:
            _freeze(self.chunks)
        else:
            self.wrapped += wrap_data_parallel(config, self.megatron_config, self.chunks)
            if config.precision == "bf16" and adapter is None:
                fuse_weight_gradients(self.chunks)
        running = self.wrapped or self.chunks
        self.passes = Passes(config, self.megatron_config, shape, world, grid, self.chunks, running, self.attachment)

    @property
    def base_is_frozen(self) -> bool:
        """Whether the adapter alone trains."""
        return not self.wrapped

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """The shard of the base's weights, in the names of `megatron_tensors`: Megatron's, with a prefix where chunks
        are several."""
        for number, chunk in enumerate(self.chunks):
            prefix = chunk_prefix(number, len(self.chunks))
            yield from ((prefix + name, parameter) for name, parameter in chunk.named_parameters())

    def base_digest(self) -> str:
        """Sums of bits of a frozen base's weights, the same under every layout. Collective."""
        return digest.of_frozen(parameter for _, parameter in self.named_parameters())

    def round_weights(self) -> None:
        """After weights have changed, where they are to be FP8's: on a GPU they are, here they get such values."""
        if self._rounds_weights:
            from megarl.policy.fp8_layers import round_weights

            round_weights(self.chunks)

    def computes_with(self) -> list[torch.Tensor]:
        """All that the model computes with: the base's weights, FP8's factors that earlier steps have left, the
        adapter's weights."""
        base = [parameter for _, parameter in self.named_parameters()]
        factors = [one.factors for one in scalings(self.chunks) if one.amax_history is not None]
        return [*base, *factors, *(() if self.adapter is None else self.adapter.parameters())]

    def measure(self, sequences: Sequence[records.Sequence]) -> list[np.ndarray]:
        """Log-probs of each sequence's trained tokens, float32 (T,) each; of nothing but on the last pipeline stage."""
        return self.survey(sequences).log_probs

    def survey(
        self,
        sequences: Sequence[records.Sequence],
        steps: Sequence[np.ndarray] | None = None,
        influence: InfluenceSettings | None = None,
    ) -> Survey:
        """One pass without a gradient. `steps`: of each sequence where its steps begin, the prompt being the first, for
        which the attention is measured as `influence` says, by default as its paper does. Collective.

        Raises `ValueError` for steps that do not begin at 0 and ascend within their sequence."""
        collect, tap = _Collect(sequences), None
        if steps is not None:
            tap = self._tap(sequences, steps, influence or InfluenceSettings())
        for chunk in self.chunks:
            chunk.eval()
        listening = nullcontext() if tap is None else tap.listening(self.chunks, self._stages)
        with torch.no_grad(), listening:
            self.passes.run(sequences, collect, forward_only=True, tap=tap)
        log_probs, entropies = collect.found()
        if tap is None:
            return Survey(log_probs, entropies, [])
        return Survey(log_probs, entropies, tap.gather(), tap.seconds)

    def _tap(
        self, sequences: Sequence[records.Sequence], steps: Sequence[np.ndarray], settings: InfluenceSettings
    ) -> InfluenceTap:
        config, passes = self.megatron_config, self.passes
        scale = config.softmax_scale or config.kv_channels**-0.5
        lengths = [one.length for one in sequences]
        return InfluenceTap(settings, steps, lengths, passes.grid, passes.shape.num_heads, scale, passes.world.device)

    def learn(
        self, sequences: Sequence[records.Sequence], stage: LossStage, *, by_group: bool, backward: bool = True
    ) -> Pass:
        """Add a pass's gradient to the buffers of what trains; without `backward` find its numbers alone."""
        for chunk in self.chunks:
            chunk.train()
        with torch.set_grad_enabled(backward):
            work = self.passes.run(sequences, stage, forward_only=not backward, by_group=by_group)
        found = stage.gather(work, reports=self.passes.grid.reports)
        if self.passes.experts is None:
            return found
        return replace(found, means=joined(self.passes.experts.report(work.micro_batches), found.means))


class _Collect:
    """Keeps each sequence's log-probs and entropies, on the device until the pass ends."""

    entropy_gradient = False

    def __init__(self, sequences: Sequence[records.Sequence]) -> None:
        self._number = len(sequences)
        self._members: list[int] = []
        self._trained: list[int] = []
        self._log_probs: list[torch.Tensor] = []
        self._entropies: list[torch.Tensor] = []

    def __call__(
        self, batch: MicroBatch, members: list[int], log_probs: torch.Tensor, entropy: torch.Tensor
    ) -> torch.Tensor:
        self._members += members
        self._trained += batch.trained
        self._log_probs.append(log_probs)
        self._entropies.append(entropy)
        return log_probs.new_zeros(())

    def found(self) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Log-probs and entropies of all sequences, of nothing where this rank saw none."""
        return self._of_sequences(self._log_probs), self._of_sequences(self._entropies)

    def _of_sequences(self, values: list[torch.Tensor]) -> list[np.ndarray]:
        kept = [np.empty(0, np.float32)] * self._number
        for index, part in zip(self._members, apart(values, self._trained), strict=True):
            kept[index] = part
        return kept


def _freeze(chunks: Sequence[GPTModel]) -> None:
    for chunk in chunks:
        chunk.requires_grad_(False)
        if chunk.pre_process:
            # What recomputes layers has gradients only where what goes in has one, and the schedule of a pipeline
            # where what comes out has.
            chunk.embedding.register_forward_hook(_with_gradient)


def _with_gradient(module: torch.nn.Module, arguments: Any, output: torch.Tensor) -> torch.Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() else output
