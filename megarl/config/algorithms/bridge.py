"""Settings of BRIDGE, and of the ways to mix demonstrations and rollouts that it is compared with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeFloat

from megarl.config.algorithms.grpo import GroupRelativeSettings
from megarl.config.base import without_effect
from megarl.config.parameter_sets import SHADOW, ParameterSet
from megarl.config.sections import OptimizerSettings, RunSettings
from megarl.errors import Refusal


class BridgeSettings(GroupRelativeSettings):
    """BRIDGE (arXiv 2509.06948): demonstrations and rollouts in one step, as two levels of one problem.

    What the authors leave open is our choice: the estimator of J_RL (any setting of GRPO), the adapter's learning rate
    and layers.
    """

    learns_demonstrations: ClassVar[bool] = True

    name: Literal["bridge"] = "bridge"
    rl_weight: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.5, description="λ: weight of what rollouts teach; demonstrations have 1 - λ."
    )
    rl_weight_schedule: Literal["constant", "linear", "alternating"] = Field(
        default="constant",
        description="constant: rl_weight in every step; linear: from 0 in the first step to rl_weight in the last; "
        "alternating: 0 in odd steps and rl_weight in even ones.",
    )
    sft_weight: NonNegativeFloat | None = Field(
        default=None,
        description="Weight of demonstrations, in place of 1 - λ: with 1 and rl_weight=1 the naive sum of both.",
    )
    sft_token_weights: Literal["uniform", "chord"] = Field(
        default="uniform",
        description="Of a demonstration's tokens: uniform, or chord: p (1 - p), where p is the policy's probability of "
        "the token (CHORD, arXiv 2508.11408).",
    )
    shadow: Literal["persistent", "rebuilt", "none"] = Field(
        default="persistent",
        description="The copy of the base that learns from rollouts alone, for the gain that the adapter is trained "
        "on. persistent: it goes its own way from the run's start; rebuilt: in every step it is the base with one "
        "update by rollouts; none: neither it nor an adapter, so that the base learns a mix of fixed weights.",
    )
    adapter_lr: NonNegativeFloat | None = Field(
        default=None,
        description="β, the adapter's peak learning rate; default optimizer.lr (our choice). Its schedule is the "
        "optimizer's, its weight decay 0.",
    )

    @property
    def kept_on_resume(self) -> tuple[str, ...]:
        names = ("rl_weight", "rl_weight_schedule", "sft_weight", "shadow")
        # A linear schedule goes over all of them.
        steps = ("steps",) if self.rl_weight_schedule == "linear" else ()
        return (*(f"algorithm.{name}" for name in names), *steps)

    def adapter_optimizer(self, run: RunSettings) -> OptimizerSettings | None:
        if self.shadow == "none":
            return None
        base = run.optimizer
        if self.adapter_lr is None:
            return base.model_copy(update={"weight_decay": 0.0})
        least = self.adapter_lr * (base.min_lr / base.lr if base.lr else 0.0)
        return base.model_copy(update={"lr": self.adapter_lr, "min_lr": least, "weight_decay": 0.0})

    def parameter_sets(self, run: RunSettings) -> tuple[ParameterSet, ...]:
        kept = super().parameter_sets(run)
        if self.shadow == "none":
            return kept
        return (*kept, ParameterSet(SHADOW, trains=True, rebuilt=self.shadow == "rebuilt"))

    def weights(self, step: int, steps: int) -> tuple[float, float]:
        """Of rollouts (λ) and of demonstrations, in step `step` (1, 2, ...) of `steps`."""
        rl = self.rl_weight
        if self.rl_weight_schedule == "linear":
            rl *= (step - 1) / max(steps - 1, 1)
        elif self.rl_weight_schedule == "alternating" and step % 2:
            rl = 0.0
        return rl, 1 - rl if self.sft_weight is None else self.sft_weight

    def refusals(self, run: RunSettings) -> Iterator[Refusal]:
        yield from super().refusals(run)
        if self.rl_weight_schedule == "linear" and not run.steps:
            yield Refusal(
                "algorithm.rl_weight_schedule=linear",
                "goes over the run's steps, of which epochs say no number",
                "give steps in place of epochs",
            )
        if self.shadow == "none":
            fix = "set algorithm.shadow to persistent or rebuilt, or remove it"
            yield from without_effect(self, "algorithm", ("adapter_lr",), "with algorithm.shadow=none", fix)
        elif self.sft_weight is not None:
            yield Refusal(
                f"algorithm.sft_weight={self.sft_weight:g}",
                f"contradicts algorithm.shadow={self.shadow}: BRIDGE's weights are λ and 1 - λ",
                "remove it, or set algorithm.shadow=none",
            )
        if self.shadow == "none" and self.rl_weight == 0 and self.sft_weight == 0:
            rule = "and algorithm.rl_weight=0 leave nothing to learn"
            yield Refusal("algorithm.sft_weight=0", rule, "raise one of the two")
        for name in ("use_precision_aware_optimizer", "optimizer_cpu_offload"):
            if run.megatron.get(name):
                yield Refusal(
                    f"megatron.{name}=true",
                    "keeps gradients where several passes' cannot be put together",
                    "remove it",
                )
