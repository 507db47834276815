"""A parameter set that trains: its weights, gradient buffers, optimizer, schedule, and where its memory is."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megarl.config.schema import RunConfig
from megarl.policy.digest import Movement
from megarl.policy.fp8_linear import end_step, scalings
from megarl.policy.megatron_config import optimizer_config
from megarl.policy.model import wrap_data_parallel
from megarl.policy.network import Network
from megarl.policy.residence import Residence


@dataclass(frozen=True, slots=True)
class StepResult:
    """One optimizer step of a parameter set; `grad_norm` is that before clipping."""

    grad_norm: float
    lr: float
    skipped: bool


@dataclass(frozen=True, slots=True)
class Gradient:
    """That of the passes of `losses`, summed over ranks: this rank's shards in fp32, which hold until the next pass
    over their network, and the norm of the whole."""

    values: list[torch.Tensor]
    norm: float
    losses: list[float]


class TrainedSet:
    """What trains of a network, its base or its adapter, and what trains it.

    A pass over the network fills the buffers of what trains of it. Gradients of any number of passes add up there until
    the step that applies them; or each is set aside (`take`), and what the step applies is a sum of such, each with a
    factor, perhaps of other networks. `step_budget` is the number of steps in the whole run; learning-rate decay spans
    it.
    """

    def __init__(self, config: RunConfig, network: Network, step_budget: int, *, of_adapter: bool = False) -> None:
        self.network, self.of_adapter = network, of_adapter
        self.modules: list[Any] = [network.adapter] if of_adapter else network.chunks
        self.wrapped: list[Any] = (
            wrap_data_parallel(config, network.megatron_config, self.modules) if of_adapter else network.wrapped
        )
        self._optimizer: Any = get_megatron_optimizer(
            optimizer_config(config), self.wrapped, use_gloo_process_groups=False
        )
        network.megatron_config.grad_scale_func = self._optimizer.scale_loss
        self.scheduler = _scheduler(config, self._optimizer, step_budget)
        self.movement = Movement(self._optimizer, config.optimizer.lr)
        self.skipped_in_a_row = 0
        frozen = network.chunks if network.base_is_frozen else ()
        self._residence = Residence(self.wrapped, self._optimizer, frozen)
        self._clip = config.optimizer.clip_grad
        # Of the passes since the last step: those whose gradients are in the buffers, and those set aside.
        self._losses: list[float] = []
        self._aside_losses: list[float] = []
        self._aside: list[torch.Tensor] = []

    @property
    def optimizer(self) -> Any:
        """Megatron's; what a GPU does with its state waits until that has come back."""
        self._residence.wait_for_state()
        return self._optimizer

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """This rank's shard of what trains, by name."""
        return self.modules[0].named_parameters() if self.of_adapter else self.network.named_parameters()

    @property
    def has_gradient(self) -> bool:
        """Whether the next step has something to apply."""
        return bool(self._losses or self._aside_losses)

    def is_filled_by(self, network: Network) -> bool:
        """Whether a pass over the network fills this set's buffers."""
        return network.adapter is self.network.adapter if self.of_adapter else network is self.network

    def pass_begins(self, *, apart: bool = False) -> None:
        """Make the buffers ready for a pass's gradients, or with `apart` for these alone. Collective."""
        if self._losses:
            if not apart:
                return
            self.add(self.take(), 1.0)
        # The first pass after a step zeroes, and not the step: buffers that were away hold anything.
        for wrapped in self.wrapped:
            wrapped.zero_grad_buffer()
        # Its state may still be on the way while the pass is computed.
        self._optimizer.zero_grad()

    def pass_ends(self, loss: float) -> None:
        """The buffers have the gradients of a pass of that loss."""
        self._losses.append(loss)

    def take(self) -> Gradient:
        """What the buffers have, summed over ranks; they begin anew with the next pass. Collective."""
        norm = self._make_ready()
        losses, self._losses = self._losses, []
        return Gradient([_gradient(one) for one in self._main_parameters()], norm, losses)

    def add(self, gradient: Gradient, factor: float) -> None:
        """Set a gradient aside for the next step, times `factor`."""
        if not self._aside:
            self._aside = [factor * values for values in gradient.values]
        else:
            for kept, values in zip(self._aside, gradient.values, strict=True):
                kept.add_(values, alpha=factor)
        self._aside_losses += gradient.losses

    def discard(self) -> None:
        """Forget what was accumulated since the last step."""
        self._losses.clear()
        self._forget_aside()
        self._forget_amaxes()

    def step(self) -> StepResult:
        """Sum the gradients over ranks, clip, and apply them with one step of optimizer and schedule. Collective.

        A NaN or infinite loss or gradient norm skips the step; `skipped_in_a_row` counts them.

        Raises:
            ValueError: nothing was accumulated since the last step.
        """
        if not self.has_gradient:
            raise ValueError("a step needs a gradient: call accumulate first")
        finite = all(math.isfinite(loss) for loss in (*self._losses, *self._aside_losses))
        if self._aside_losses:
            if self._losses:
                self.add(self.take(), 1.0)
            for parameter, values in zip(self._main_parameters(), self._aside, strict=True):
                parameter.grad = values
            self._forget_aside()
            grad_norm = float(self.optimizer.get_grad_norm())
        else:
            grad_norm = self._make_ready()
        self._losses.clear()
        lr = float(self.optimizer.param_groups[0]["lr"])
        result = self._apply(grad_norm, lr, skipped=not (finite and math.isfinite(grad_norm)))
        # What was set aside is the gradient now, and nobody's buffer: it would stay.
        for parameter in self._main_parameters():
            parameter.grad = None
        return result

    def _apply(self, grad_norm: float, lr: float, *, skipped: bool) -> StepResult:
        if skipped:
            self.skipped_in_a_row += 1
            # An infinite amax would keep delayed scaling from finding a factor for as long as the history goes back.
            self._forget_amaxes()
            return StepResult(grad_norm, lr, skipped=True)
        self.skipped_in_a_row = 0
        self.movement.update_begins(grad_norm, lr)
        for optimizer in self.optimizer.chained_optimizers:
            if self._clip > 0 and not optimizer.is_stub_optimizer:
                clip_grad_by_total_norm_fp32(optimizer.get_parameters(), self._clip, grad_norm)
        self.optimizer.step_with_ready_grads()
        self.network.round_weights()
        self.scheduler.step(increment=1)
        end_step(scalings(self.network.chunks))
        return StepResult(grad_norm, lr, skipped=False)

    def _make_ready(self) -> float:
        """Sum the buffers' gradients over ranks and give them to the optimizer; their norm. Collective."""
        if self.of_adapter:
            adapter = self.network.adapter
            assert adapter is not None
            # Copies first: what comes back from the data-parallel ranks is each one's share.
            adapter.sum_copies()
            for wrapped in self.wrapped:
                wrapped.finish_grad_sync()
        else:
            # Losses are divided already: no token count.
            finalize_model_grads(self.wrapped, None)
        self.optimizer.prepare_grads()
        return float(self.optimizer.get_grad_norm())

    def _main_parameters(self) -> list[Any]:
        """The optimizer's own, this rank's shards, in an order that networks of one layout share."""
        return [
            parameter
            for optimizer in self.optimizer.chained_optimizers
            if not optimizer.is_stub_optimizer
            for parameter in optimizer.get_parameters()
        ]

    def _forget_aside(self) -> None:
        self._aside, self._aside_losses = [], []

    def _forget_amaxes(self) -> None:
        for one in scalings(self.network.chunks):
            one.forget()

    def weights_changed(self) -> None:
        """Tell the optimizer that the weights were written from outside (its fp32 copies follow)."""
        self.optimizer.reload_model_params()
        # Afterwards: the optimizer's own weights are finer than FP8's.
        self.network.round_weights()
        self.movement.forget()
        self._residence.forget()

    def copy(self, other: TrainedSet) -> None:
        """Take the weights of another set that trains the same of its network."""
        with torch.no_grad():
            for (_, own), (_, values) in zip(self.named_parameters(), other.named_parameters(), strict=True):
                own.copy_(values)
            for own, found in zip(scalings(self.network.chunks), scalings(other.network.chunks), strict=True):
                own.load_state_dict(found.state_dict())
            if self.network.delayed_scaling is not None and other.network.delayed_scaling is not None:
                self.network.delayed_scaling.load(other.network.delayed_scaling.tensors)
            self.weights_changed()
            # The optimizer's own weights are finer than the model's where these are bf16.
            for own, values in zip(self._main_parameters(), other._main_parameters(), strict=True):
                own.copy_(values)

    # --- whose the memory is ----------------------------------------------------------------------------------------

    def offload_optimizer(self) -> None:
        """Optimizer state goes to host memory and gradient buffers are freed; weights stay, as a push reads them."""
        self._residence.offload_optimizer()

    def put_away(self) -> None:
        """Nothing of it stays on the device."""
        self._residence.offload_optimizer()
        self._residence.offload_weights()

    def offload_weights(self) -> None:
        """The weights go too."""
        self._residence.offload_weights()

    def onload_weights(self) -> None:
        """The weights come back, for a push."""
        self._residence.onload_weights()

    def onload_state(self) -> None:
        """What is saved comes back: weights and optimizer state."""
        self._residence.onload_state()

    def onload(self) -> None:
        """Everything comes back."""
        self._residence.onload()


def _gradient(parameter: Any) -> torch.Tensor:
    return torch.zeros_like(parameter, dtype=torch.float32) if parameter.grad is None else parameter.grad


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
