"""A parameter set that trains: its weights, gradient buffers, optimizer, schedule, and where its memory is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megarl import records
from megarl.config.schema import RunConfig
from megarl.errors import PhaseError
from megarl.policy.batch import MicroBatch
from megarl.policy.digest import Movement
from megarl.policy.losses import LossStage, Pass, joined
from megarl.policy.megatron_config import optimizer_config
from megarl.policy.network import Network
from megarl.policy.residence import Residence


@dataclass(frozen=True, slots=True)
class StepResult:
    """One optimizer step of a parameter set; `grad_norm` is that before clipping."""

    grad_norm: float
    lr: float
    skipped: bool


class TrainedSet:
    """What trains of a network, its chunks or their adapter, and what trains it.

    Gradients of any number of passes add up in its buffers until the step that applies them. `step_budget` is the
    number of steps in the whole run; learning-rate decay spans it.
    """

    def __init__(self, config: RunConfig, network: Network, step_budget: int) -> None:
        self.network, self.passes = network, network.passes
        self.wrapped: Any = network.wrapped
        self.optimizer: Any = get_megatron_optimizer(optimizer_config(config), self.wrapped)
        network.megatron_config.grad_scale_func = self.optimizer.scale_loss
        self.scheduler = _scheduler(config, self.optimizer, step_budget)
        self.movement = Movement(self.optimizer, config.optimizer.lr)
        self.skipped_in_a_row = 0
        frozen = () if network.adapter is None else network.chunks
        self._residence = Residence(self.wrapped, self.optimizer, frozen)
        self._clip = config.optimizer.clip_grad
        self._losses: list[float] = []

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """This rank's shard of what trains: see `Network.trained_parameters`."""
        return self.network.trained_parameters()

    def measure(self, sequences: Sequence[records.Sequence]) -> list[np.ndarray]:
        """Log-probs of each sequence's trained tokens, float32 (T,) each; of nothing but on the last pipeline stage."""
        self._residence.require_ready("compute log-probs")
        collect = _Collect(sequences)
        for chunk in self.network.chunks:
            chunk.eval()
        with torch.no_grad():
            self.passes.run(sequences, collect, forward_only=True)
        return collect.found

    def accumulate(self, sequences: Sequence[records.Sequence], stage: LossStage, *, by_group: bool) -> Pass:
        """Add a pass's gradient to what was accumulated since the last step."""
        self._residence.require_ready("update the policy")
        for wrapped in self.wrapped:
            # The first pass after a step zeroes, and not the step: buffers that were away hold anything.
            if not self._losses:
                wrapped.zero_grad_buffer()
        for chunk in self.network.chunks:
            chunk.train()
        if not self._losses:
            self.optimizer.zero_grad()
        work = self.passes.run(sequences, stage, forward_only=False, by_group=by_group)
        found = stage.gather(work, reports=self.passes.grid.reports)
        if self.passes.experts is not None:
            routed = self.passes.experts.report(work.micro_batches)
            found = replace(found, means=joined(routed, found.means))
        self._losses.append(found.loss)
        return found

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
        self._residence.require_ready("update the policy")
        finite = all(math.isfinite(loss) for loss in self._losses)
        self._losses.clear()
        self._sum_gradients()
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

    def _sum_gradients(self) -> None:
        adapter = self.network.adapter
        if adapter is None:
            # Losses are divided already: no token count.
            finalize_model_grads(self.wrapped, None)
            return
        # Copies first: what comes back from the data-parallel ranks is each one's share.
        adapter.sum_copies()
        for wrapped in self.wrapped:
            wrapped.finish_grad_sync()

    def weights_changed(self) -> None:
        """Tell the optimizer that the weights were written from outside (its fp32 copies follow)."""
        self.optimizer.reload_model_params()
        self.movement.forget()
        self._residence.forget()

    def copy(self, weights: Sequence[torch.Tensor]) -> None:
        """Take other weights, those of all of the network's parameters in their order."""
        with torch.no_grad():
            for parameter, values in zip(self.network.parameters(), weights, strict=True):
                parameter.copy_(values)
        self.weights_changed()

    # --- whose the memory is ----------------------------------------------------------------------------------------

    def offload_optimizer(self) -> None:
        """Optimizer state goes to host memory and gradient buffers are freed; weights stay, as a push reads them.

        Raises:
            PhaseError: gradients were accumulated, and would be lost.
        """
        if self._losses:
            raise PhaseError("cannot give the policy's memory to the engine before its gradients are applied")
        self._residence.offload_optimizer()

    def offload_weights(self) -> None:
        """The weights go too."""
        self._residence.offload_weights()

    def onload_weights(self) -> None:
        """The weights come back, for a push."""
        self._residence.onload_weights()

    def onload(self) -> None:
        """Everything comes back."""
        self._residence.onload()


class _Collect:
    """Keeps each sequence's log-probs."""

    entropy_gradient = False

    def __init__(self, sequences: Sequence[records.Sequence]) -> None:
        self.found: list[np.ndarray] = [np.empty(0, np.float32)] * len(sequences)
        self._trained = [sequence.trained for sequence in sequences]

    def __call__(
        self, batch: MicroBatch, members: list[int], log_probs: torch.Tensor, entropy: torch.Tensor
    ) -> torch.Tensor:
        parts = log_probs.float().cpu().split([self._trained[i] for i in members])
        for index, part in zip(members, parts, strict=True):
            self.found[index] = part.numpy()
        return log_probs.new_zeros(())


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
