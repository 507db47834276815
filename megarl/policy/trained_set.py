"""A parameter set that trains: its gradient buffers, optimizer, schedule, and where its memory is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.transformer_config import TransformerConfig

from megarl.config.schema import RunConfig
from megarl.policy.digest import Movement
from megarl.policy.megatron_config import optimizer_config
from megarl.policy.model import wrap_data_parallel
from megarl.policy.residence import Residence


@dataclass(frozen=True, slots=True)
class StepResult:
    """One optimizer step of a parameter set; `grad_norm` is that before clipping."""

    grad_norm: float
    lr: float
    skipped: bool


class TrainedSet:
    """The trained parameters of `chunks`, this rank's shard of them.

    Gradients of any number of passes add up in its buffers until the step that applies them. `wrapped` is what a pass
    runs. `step_budget` is the number of steps in the whole run; learning-rate decay spans it.
    """

    def __init__(
        self, config: RunConfig, megatron_config: TransformerConfig, chunks: Sequence[GPTModel], step_budget: int
    ) -> None:
        self.wrapped: Any = wrap_data_parallel(config, megatron_config, chunks)
        self.optimizer: Any = get_megatron_optimizer(optimizer_config(config), self.wrapped)
        self.scheduler = _scheduler(config, self.optimizer, step_budget)
        self.residence = Residence(self.wrapped, self.optimizer)
        self.movement = Movement(self.optimizer, config.optimizer.lr)
        self.skipped_in_a_row = 0
        self._clip = config.optimizer.clip_grad
        self._losses: list[float] = []

    def begin_pass(self) -> None:
        """Before a pass with gradients: what was accumulated since the last step stays."""
        for wrapped in self.wrapped:
            # The first pass after a step zeroes, and not the step: buffers that were away hold anything.
            if not self._losses:
                wrapped.zero_grad_buffer()
            wrapped.train()
        if not self._losses:
            self.optimizer.zero_grad()

    def end_pass(self, loss: float) -> None:
        """After a pass, whose loss over all ranks was that."""
        self._losses.append(loss)

    def discard(self) -> None:
        """Forget what was accumulated since the last step."""
        self._losses.clear()

    def step(self) -> StepResult:
        """Sum the gradients over ranks, clip, and apply them with one step of optimizer and schedule. Collective.

        A NaN or infinite loss or gradient norm skips the step; `skipped_in_a_row` counts them.

        Raises:
            ValueError: nothing was accumulated since the last step.
        """
        if not self._losses:
            raise ValueError("a step needs a gradient: call accumulate first")
        finite = all(math.isfinite(loss) for loss in self._losses)
        self._losses.clear()
        # Losses are divided already: no token count.
        finalize_model_grads(self.wrapped, None)
        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        lr = float(self.optimizer.param_groups[0]["lr"])
        if not (finite and math.isfinite(grad_norm)):
            self.skipped_in_a_row += 1
            return StepResult(grad_norm, lr, skipped=True)
        self.skipped_in_a_row = 0
        self.movement.update_begins(grad_norm, lr)
        for optimizer in self.optimizer.chained_optimizers:
            if self._clip > 0 and not optimizer.is_stub_optimizer:
                clip_grad_by_total_norm_fp32(optimizer.get_parameters(), self._clip, grad_norm)
        self.optimizer.step_with_ready_grads()
        self.scheduler.step(increment=1)
        return StepResult(grad_norm, lr, skipped=False)

    def weights_changed(self) -> None:
        """Tell the optimizer that the weights were written from outside (its fp32 copies follow)."""
        self.optimizer.reload_model_params()
        self.movement.forget()


def _scheduler(config: RunConfig, optimizer: Any, step_budget: int) -> OptimizerParamScheduler:
    """Megatron's learning-rate schedule, counted in optimizer steps."""
    settings = config.optimizer
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=settings.warmup_steps,
        lr_decay_steps=max(step_budget, settings.warmup_steps + 1),
        lr_decay_style=settings.decay,
        # A continued run takes its count of steps from the checkpoint and its settings from the configuration.
        override_opt_param_scheduler=True,
        use_checkpoint_opt_param_scheduler=False,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
