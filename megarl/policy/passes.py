"""Passes of Megatron's schedule over micro-batches bounded in tokens: log-probs and entropies of trained tokens."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Sequences
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig

from megarl.config.fp8 import MULTIPLE
from megarl.config.grid import Grid
from megarl.config.model_shape import ModelShape
from megarl.config.schema import RunConfig
from megarl.data.packing import microbatches, padded_microbatches
from megarl.parallel import progress
from megarl.parallel.bootstrap import World
from megarl.parallel.context import whole_sequences
from megarl.parallel.exchange import gather_all
from megarl.parallel.vocab import VocabularyShard, token_log_probs, vocabulary_shard
from megarl.policy.adapter import Attachment
from megarl.policy.batch import Cut, MicroBatch, lay_out
from megarl.policy.determinism import deterministic_algorithms
from megarl.policy.experts import Experts
from megarl.policy.forward import ForwardArguments
from megarl.policy.influence import InfluenceTap
from megarl.records import Sequence


@dataclass(frozen=True, slots=True)
class Work:
    """What a pass over micro-batches computed: tokens of a whole data-parallel replica, padding aside and included."""

    real_tokens: int
    computed_tokens: int
    micro_batches: int


class Consumer(Protocol):
    """What is done with a micro-batch's log-probs and entropies, (T,) each; `members` are its sequences' positions."""

    entropy_gradient: bool

    def __call__(
        self, batch: MicroBatch, members: list[int], log_probs: torch.Tensor, entropy: torch.Tensor
    ) -> torch.Tensor:
        """The loss, a scalar."""
        ...


class Passes:
    """Runs a model's chunks, this rank's, over sequences under one parallel layout.

    `wrapped` are the chunks with their gradient buffers, or where they have none the chunks themselves; `attachment` is
    that of an adapter, which changes their weights.
    """

    def __init__(
        self,
        config: RunConfig,
        megatron_config: TransformerConfig,
        shape: ModelShape,
        world: World,
        grid: Grid,
        chunks: list[GPTModel],
        wrapped: Sequences[Any],
        attachment: Attachment | None = None,
    ) -> None:
        self.config, self.shape, self.world, self.grid = config, shape, world, grid
        self.chunks, self._wrapped, self._attachment = chunks, wrapped, attachment
        self._megatron_config = megatron_config
        sequence_parallel = grid.tensor if megatron_config.sequence_parallel else 1
        self.cut = Cut(grid.context, grid.context_rank, sequence_parallel, MULTIPLE if config.uses_fp8 else 1)
        self.forward_arguments = ForwardArguments(megatron_config, shape, chunks)
        self.experts: Experts | None = None
        if shape.is_moe:
            # Of the balancing loss; the routers' configuration carries another one during a pass.
            coefficient: Any = megatron_config.moe_aux_loss_coeff
            replay = config.moe.routing_replay == "on"
            self.experts = Experts(chunks, shape, grid, coefficient=coefficient, replay=replay)

    def run(
        self,
        sequences: Sequences[Sequence],
        consume: Consumer,
        *,
        forward_only: bool,
        by_group: bool = False,
        tap: InfluenceTap | None = None,
    ) -> Work:
        """One pass. Collective.

        With `by_group` the sequences of a group share a micro-batch. `tap` is told which one the layers see.
        """
        plan = self._plan(sequences, by_group)
        batches = self._laid_out(sequences, plan)
        if self.experts is not None:
            self.experts.begin(batches, self.cut.sequence_parallel, training=not forward_only)
        if not plan:
            return Work(0, 0, 0)

        def forward_step(queue: Iterator[tuple[MicroBatch, list[int]]], model: Any) -> tuple[torch.Tensor, Any]:
            progress.tick()
            batch, members = next(queue)
            if tap is not None:
                tap.now(batch, members)
            output = model(**self.forward_arguments.of(batch))

            def loss(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
                log_probs, entropy = self._token_log_probs(hidden, batch, consume.entropy_gradient)
                # An empty micro-batch has nothing to say, but its backward pass takes part in the others' collectives.
                value = consume(batch, members, log_probs, entropy) if members else log_probs.sum()
                return value, torch.ones((), dtype=torch.int), {}

            return output, loss

        schedule: Any = get_forward_backward_func()
        with deterministic_algorithms(self.config.deterministic):
            schedule(
                forward_step_func=forward_step,
                # Under the interleaved schedule every chunk goes through the micro-batches at its own time.
                data_iterator=[iter(zip(batches, plan, strict=True)) for _ in self.chunks],
                model=self._wrapped,
                num_microbatches=len(batches),
                seq_length=max(b.tokens.shape[1] for b in batches) * self.grid.context,
                micro_batch_size=1,
                forward_only=forward_only,
            )
        computed = sum(b.computed_tokens for b in batches) * self.grid.context
        return Work(sum(b.real_tokens for b in batches), computed, len(batches))

    def _laid_out(self, sequences: Sequences[Sequence], plan: list[list[int]]) -> list[MicroBatch]:
        """The micro-batches; where stages do not tell each other how long messages are, all as long as the longest."""
        packed, least = self.config.batch.packed, 0
        if not self._megatron_config.variable_seq_lengths:
            least = max((sum(self.cut.padded(sequences[i].length) for i in part) for part in plan), default=0)
        return [
            lay_out([sequences[i] for i in part], packed=packed, cut=self.cut, device=self.world.device, least=least)
            for part in plan
        ]

    def _plan(self, sequences: Sequences[Sequence], by_group: bool) -> list[list[int]]:
        """Positions of the sequences of each micro-batch; an empty micro-batch is there to keep others company.

        Replicas that share experts work on their micro-batches together and need equally many; the interleaved schedule
        needs a multiple of the pipeline's stages.
        """
        settings = self.config.batch
        pack = microbatches if settings.packed else padded_microbatches
        groups = [s.group for s in sequences] if by_group else None
        plan = pack([self.cut.padded(s.length) for s in sequences], settings.tokens_per_microbatch, groups)
        count = len(plan)
        if self.grid.experts_span_replicas:
            count = max(gather_all(count))
        if len(self.chunks) > 1:
            count = -(-count // self.grid.pipeline) * self.grid.pipeline
        return plan + [[] for _ in range(count - len(plan))]

    def _token_log_probs(
        self, hidden: torch.Tensor, batch: MicroBatch, entropy_gradient: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = hidden.reshape(-1, hidden.shape[-1]).index_select(0, batch.rows)
        tied, head = self.shape.tied_embeddings, self.chunks[-1]
        with nullcontext() if self._attachment is None else self._attachment.head():
            weight: Any = head.shared_embedding_or_output_weight() if tied else head.output_layer.weight
            log_probs, entropy = token_log_probs(
                rows,
                weight,
                batch.targets,
                self._vocabulary_shard(weight),
                temperature=batch.temperature,
                chunk=self.config.batch.logprob_chunk,
                entropy_gradient=entropy_gradient,
            )
        if self.grid.context == 1:
            return log_probs, entropy
        group: Any = parallel_state.get_context_parallel_group()
        return whole_sequences(log_probs, batch.parts, group), whole_sequences(entropy, batch.parts, group)

    def _vocabulary_shard(self, weight: torch.Tensor) -> VocabularyShard:
        group: Any = parallel_state.get_tensor_model_parallel_group()
        return vocabulary_shard(self.shape.vocab_size, weight.shape[0], self.grid.tensor_rank, group)
