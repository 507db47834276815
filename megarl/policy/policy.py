"""The policy: a Megatron model with its optimizer, seen by the rest of megarl as a few verbs.

Every method is called by all ranks together. Values per token exist on the last pipeline stage only;
the numbers returned for a whole mini-batch are the same on every rank.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Sequences
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func

from megarl.algorithms.base import Algorithm
from megarl.algorithms.objective import BatchTotals, LossInputs, LossTerms
from megarl.config import gpu_rules
from megarl.config.grid import Grid, chunks_of_stage
from megarl.config.model_shape import ModelShape
from megarl.config.parameter_sets import POLICY
from megarl.config.schema import RunConfig
from megarl.data.packing import microbatches, padded_microbatches
from megarl.parallel import progress
from megarl.parallel.bootstrap import World
from megarl.parallel.context import whole_sequences
from megarl.parallel.cpu_platform import has_cuda
from megarl.parallel.exchange import gather_all
from megarl.parallel.vocab import VocabularyShard, token_log_probs, vocabulary_shard
from megarl.policy.batch import Cut, MicroBatch, lay_out
from megarl.policy.digest import Movement
from megarl.policy.experts import Experts
from megarl.policy.forward import ForwardArguments
from megarl.policy.megatron_config import optimizer_config, transformer_config
from megarl.policy.model import build_model, wrap_data_parallel
from megarl.policy.residence import Residence
from megarl.policy.weight_sets import WeightSets
from megarl.records import Sequence
from megarl.reshard.weight_map import chunk_prefix


@dataclass(frozen=True, slots=True)
class UpdateResult:
    """One optimizer update. `means` are what the loss stage sums up / the counts over all ranks, those of which
    the mini-batch has nothing to count left out, and what `Experts.report` says. `loss_seconds` is the longest time
    that a rank spent in the algorithm's loss function (its backward pass, and work that a GPU has queued, left out)."""

    loss: float
    grad_norm: float
    lr: float
    skipped: bool
    means: dict[str, float]
    gap_max: float
    loss_seconds: float
    real_tokens: int
    computed_tokens: int


@dataclass(frozen=True, slots=True)
class Work:
    """What a pass over micro-batches computed: tokens of a whole data-parallel replica, padding aside and included."""

    real_tokens: int
    computed_tokens: int
    micro_batches: int


class Policy:
    """A Megatron policy under one parallel layout.

    `step_budget` is the number of optimizer updates in the whole run; learning-rate decay spans it. All
    log-probs are those of the distribution at `temperature`; default: that of the rollouts.
    """

    def __init__(
        self,
        config: RunConfig,
        shape: ModelShape,
        world: World,
        grid: Grid,
        step_budget: int,
        temperature: float | None = None,
    ) -> None:
        self.config, self.shape, self.world, self.grid = config, shape, world, grid
        self.temperature = config.rollout.temperature if temperature is None else temperature
        if has_cuda():
            for refusal in gpu_rules.of_policy(config):
                raise refusal
        self.megatron_config = transformer_config(config, shape)
        # The routers' configuration carries another one during a pass, see `Experts`.
        coefficient: Any = self.megatron_config.moe_aux_loss_coeff
        stages = chunks_of_stage(shape.num_layers, config.parallel, grid.pipeline_rank)
        self.chunks = build_model(self.megatron_config, shape, stages)
        self.wrapped: Any = wrap_data_parallel(config, self.megatron_config, self.chunks)
        self.optimizer: Any = get_megatron_optimizer(optimizer_config(config), self.wrapped)
        self.megatron_config.grad_scale_func = self.optimizer.scale_loss
        self.scheduler = _scheduler(config, self.optimizer, step_budget)
        self.weight_sets = WeightSets(p for chunk in self.chunks for p in chunk.parameters())
        self.residence = Residence(self.wrapped, self.optimizer)
        self.movement = Movement(self.optimizer, config.optimizer.lr)
        self.forward_arguments = ForwardArguments(self.megatron_config, shape, self.chunks)
        self.experts: Experts | None = None
        if shape.is_moe:
            replay = config.moe.routing_replay == "on"
            self.experts = Experts(self.chunks, shape, grid, coefficient=coefficient, replay=replay)
        self.skipped_in_a_row = 0

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """This rank's shard, in the names of `megatron_tensors`: Megatron's, with a prefix where chunks are several."""
        for number, chunk in enumerate(self.chunks):
            prefix = chunk_prefix(number, len(self.chunks))
            yield from ((prefix + name, parameter) for name, parameter in chunk.named_parameters())

    def weights_changed(self) -> None:
        """Tell the optimizer that the weights were written from outside (its fp32 copies follow)."""
        self.optimizer.reload_model_params()
        self.movement.forget()

    @contextmanager
    def using(self, weights: str) -> Iterator[None]:
        """Run with the named parameter set in place of the policy's own weights."""
        if weights == POLICY:
            yield
            return
        with self.weight_sets.using(weights):
            yield

    def log_probs(self, sequences: Sequences[Sequence], weights: str = POLICY) -> list[np.ndarray] | None:
        """Log-probs of each sequence's response tokens, float32 (T,) each, under `weights`.

        `sequences` are those of this data-parallel rank. None on all but the last pipeline stage.
        """
        self.residence.require_ready("compute log-probs")
        found: list[np.ndarray] = [np.empty(0, np.float32)] * len(sequences)

        def consume(batch: MicroBatch, members: list[int], log_probs: torch.Tensor, entropy: torch.Tensor) -> Any:
            parts = log_probs.float().cpu().split([sequences[i].response_length for i in members])
            for index, part in zip(members, parts, strict=True):
                found[index] = part.numpy()
            return log_probs.new_zeros(()), {}

        with torch.no_grad(), self.using(weights):
            for chunk in self.chunks:
                chunk.eval()
            self._run(sequences, consume, forward_only=True)
        return found if self.grid.is_last_stage else None

    def update(
        self,
        sequences: Sequences[Sequence],
        algorithm: Algorithm,
        totals: BatchTotals,
        look: Callable[[UpdateResult], None] | None = None,
    ) -> UpdateResult:
        """One optimizer update on a mini-batch, of which `sequences` are this data-parallel rank's share.

        `look` sees what the forward passes have found, the same on all ranks, before anything is learned; it may raise.
        A NaN or infinite loss or gradient norm skips the update; `skipped_in_a_row` counts them.
        """
        self.residence.require_ready("update the policy")
        for wrapped in self.wrapped:
            wrapped.zero_grad_buffer()
            wrapped.train()
        self.optimizer.zero_grad()
        stage = _LossStage(algorithm, totals)
        work = self._run(sequences, stage, forward_only=False, by_group=algorithm.needs.pairs)
        record = self._gather(stage, work)
        if self.experts is not None:
            record = replace(record, means=record.means | self.experts.report(work.micro_batches))
        if look is not None:
            look(record)
        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        lr = float(self.optimizer.param_groups[0]["lr"])
        skipped = not (math.isfinite(grad_norm) and math.isfinite(record.loss))
        if skipped:
            self.skipped_in_a_row += 1
        else:
            self.skipped_in_a_row = 0
            self.movement.update_begins(grad_norm, lr)
            self._step(grad_norm)
        return replace(record, grad_norm=grad_norm, lr=lr, skipped=skipped)

    def _step(self, grad_norm: float) -> None:
        for optimizer in self.optimizer.chained_optimizers:
            if self.config.optimizer.clip_grad > 0 and not optimizer.is_stub_optimizer:
                clip_grad_by_total_norm_fp32(optimizer.get_parameters(), self.config.optimizer.clip_grad, grad_norm)
        self.optimizer.step_with_ready_grads()
        self.scheduler.step(increment=1)

    def _run(
        self, sequences: Sequences[Sequence], consume: Callable[..., Any], *, forward_only: bool, by_group: bool = False
    ) -> Work:
        """Run Megatron's schedule over token-bounded micro-batches.

        With `by_group` the sequences of a group share a micro-batch.
        """
        cut = self._cut()
        plan = self._plan(sequences, by_group, cut)
        if not plan:
            return Work(0, 0, 0)
        batches = [
            lay_out([sequences[i] for i in part], packed=self.config.batch.packed, cut=cut, device=self.world.device)
            for part in plan
        ]

        if self.experts is not None:
            self.experts.begin(batches, cut.sequence_parallel, training=not forward_only)

        def forward_step(queue: Iterator[tuple[MicroBatch, list[int]]], model: Any) -> tuple[torch.Tensor, Any]:
            progress.tick()
            batch, members = next(queue)
            output = model(**self.forward_arguments.of(batch))

            def loss(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
                log_probs, entropy = self._token_log_probs(hidden, batch, consume)
                # An empty micro-batch has nothing to say, but its backward pass takes part in the others' collectives.
                value, report = consume(batch, members, log_probs, entropy) if members else (log_probs.sum(), {})
                return value, torch.ones((), dtype=torch.int), report

            return output, loss

        schedule: Any = get_forward_backward_func()
        schedule(
            forward_step_func=forward_step,
            # Under the interleaved schedule every chunk goes through the micro-batches at its own time.
            data_iterator=[iter(zip(batches, plan, strict=True)) for _ in self.chunks],
            model=self.wrapped,
            num_microbatches=len(batches),
            seq_length=max(b.tokens.shape[1] for b in batches) * self.grid.context,
            micro_batch_size=1,
            forward_only=forward_only,
        )
        computed = sum(b.computed_tokens for b in batches) * self.grid.context
        return Work(sum(b.real_tokens for b in batches), computed, len(batches))

    def _plan(self, sequences: Sequences[Sequence], by_group: bool, cut: Cut) -> list[list[int]]:
        """Positions of the sequences of each micro-batch; an empty micro-batch is there to keep others company.

        Replicas that share experts work on their micro-batches together and need equally many; the interleaved schedule
        needs a multiple of the pipeline's stages.
        """
        settings = self.config.batch
        pack = microbatches if settings.packed else padded_microbatches
        groups = [s.group for s in sequences] if by_group else None
        plan = pack([cut.padded(s.length) for s in sequences], settings.tokens_per_microbatch, groups)
        count = len(plan)
        if self.grid.experts_span_replicas:
            count = max(gather_all(count))
        if len(self.chunks) > 1:
            count = -(-count // self.grid.pipeline) * self.grid.pipeline
        return plan + [[] for _ in range(count - len(plan))]

    def _cut(self) -> Cut:
        sequence_parallel = self.grid.tensor if self.megatron_config.sequence_parallel else 1
        return Cut(self.grid.context, self.grid.context_rank, sequence_parallel)

    def _token_log_probs(
        self, hidden: torch.Tensor, batch: MicroBatch, consume: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = hidden.reshape(-1, hidden.shape[-1]).index_select(0, batch.rows)
        tied, head = self.shape.tied_embeddings, self.chunks[-1]
        weight: Any = head.shared_embedding_or_output_weight() if tied else head.output_layer.weight
        log_probs, entropy = token_log_probs(
            rows,
            weight,
            batch.targets,
            self._vocabulary_shard(weight),
            temperature=self.temperature,
            chunk=self.config.batch.logprob_chunk,
            entropy_gradient=getattr(consume, "entropy_gradient", False),
        )
        if self.grid.context == 1:
            return log_probs, entropy
        group: Any = parallel_state.get_context_parallel_group()
        return whole_sequences(log_probs, batch.parts, group), whole_sequences(entropy, batch.parts, group)

    def _vocabulary_shard(self, weight: torch.Tensor) -> VocabularyShard:
        group: Any = parallel_state.get_tensor_model_parallel_group()
        return vocabulary_shard(self.shape.vocab_size, weight.shape[0], self.grid.tensor_rank, group)

    def _gather(self, stage: _LossStage, work: Work) -> UpdateResult:
        """Sum one mini-batch's report over all replicas; every rank gets the same numbers."""
        mine = (stage.loss, stage.shares, stage.gap_max, stage.seconds, work) if self.grid.reports else None
        reports: list[Any] = [None] * self.world.size
        dist.all_gather_object(reports, mine)
        present = [r for r in reports if r is not None]
        # A replica whose micro-batches are all empty has no names.
        names = dict.fromkeys(name for r in present for name in r[1])
        return UpdateResult(
            loss=sum(r[0] for r in present),
            grad_norm=0.0,
            lr=0.0,
            skipped=False,
            means={name: sum(r[1].get(name, 0.0) for r in present) for name in names},
            gap_max=max(r[2] for r in present),
            loss_seconds=max(r[3] for r in present),
            real_tokens=sum(r[4].real_tokens for r in present),
            computed_tokens=sum(r[4].computed_tokens for r in present),
        )


class _LossStage:
    """The algorithm's loss on each micro-batch, and this replica's shares of the loss and of the means to log."""

    def __init__(self, algorithm: Algorithm, totals: BatchTotals) -> None:
        self.algorithm, self.totals = algorithm, totals
        self.entropy_gradient = algorithm.needs.entropy_gradient
        self.loss = 0.0
        self.shares: dict[str, float] = {}
        self.gap_max = 0.0
        self.seconds = 0.0

    def __call__(self, batch: MicroBatch, members: list[int], log_probs: torch.Tensor, entropy: torch.Tensor) -> Any:
        old = log_probs.detach() if batch.old_log_probs is None else batch.old_log_probs
        rollout = old if batch.rollout_log_probs is None else batch.rollout_log_probs
        start = time.perf_counter()
        terms = self.algorithm.loss(
            LossInputs(
                log_probs_T=log_probs,
                entropy_T=entropy,
                old_log_probs_T=old,
                rollout_log_probs_T=rollout,
                reference_log_probs_T=batch.reference_log_probs,
                advantages_T=batch.advantages,
                mask_T=torch.ones_like(log_probs),
                sequence_T=batch.sequence,
                num_sequences=batch.num_sequences,
                lengths_S=batch.lengths,
                signals_S=batch.signals,
                target_S=batch.target,
                group_S=batch.group,
                totals=self.totals,
            )
        )
        self.seconds += time.perf_counter() - start
        self.loss += float(terms.loss.detach())
        self._log(terms, batch, gap=old - rollout, entropy=entropy.detach())
        return terms.loss, {}

    def _log(self, terms: LossTerms, batch: MicroBatch, gap: torch.Tensor, entropy: torch.Tensor) -> None:
        answers = ~batch.target[batch.sequence]
        gap = torch.where(answers, gap, 0.0)
        token_sums = dict(terms.token_sums)
        token_sums |= {"logprob_gap_mean": gap.abs().sum(), "logprob_k3": (gap.exp() - 1 - gap).sum()}
        token_sums["entropy"] = torch.where(answers, entropy, 0.0).sum()
        for sums, count in (
            (token_sums, self.totals.tokens),
            (terms.target_token_sums, self.totals.target_tokens),
            (terms.target_sums, self.totals.target_sequences),
        ):
            if count:
                for name, value in sums.items():
                    self.shares[name] = self.shares.get(name, 0.0) + float(value.detach()) / count
        # Python's max would drop a NaN.
        self.gap_max = float(np.maximum(self.gap_max, float(gap.abs().max())))


def _scheduler(config: RunConfig, optimizer: Any, step_budget: int) -> OptimizerParamScheduler:
    """Megatron's learning-rate schedule, counted in optimizer updates."""
    settings = config.optimizer
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=settings.warmup_steps,
        lr_decay_steps=max(step_budget, settings.warmup_steps + 1),
        lr_decay_style=settings.decay,
        # A continued run takes its count of updates from the checkpoint and its settings from the configuration.
        override_opt_param_scheduler=True,
        use_checkpoint_opt_param_scheduler=False,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
