"""Settings of GRPO, and of the algorithms whose rollout term is GRPO's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from megarl.config.algorithms.base import AlgorithmSettings
from megarl.config.sections import RunSettings
from megarl.errors import Refusal


class GroupRelativeSettings(AlgorithmSettings):
    """Group-relative advantages and the clipped objective (arXiv 2402.03300; Dr. GRPO 2503.20783, DAPO 2503.14476,
    GSPO 2507.18071)."""

    normalize_std: bool = Field(
        default=True, description="Divide advantages by the group's standard deviation; off is Dr. GRPO."
    )
    std_estimator: Literal["population", "sample"] = Field(
        default="population", description="Divide the squared deviations by n (population) or n-1 (sample)."
    )
    std_epsilon: Annotated[float, Field(ge=0)] = Field(default=1e-6, description="Added to the standard deviation.")
    singleton_advantage: Literal["zero", "reward"] = Field(
        default="zero", description="Advantage of a group with one member: 0, or its raw reward."
    )
    aggregation: Literal["token_mean", "sequence_mean", "constant"] = Field(
        default="token_mean",
        description="token_mean: sum over all tokens of the mini-batch / their count (DAPO); sequence_mean: mean per "
        "sequence, then over sequences (classic GRPO); constant: sum / (sequences x aggregation_constant) (Dr. GRPO).",
    )
    aggregation_constant: PositiveFloat | None = Field(
        default=None, description="Divisor of aggregation=constant in tokens; default rollout.max_tokens."
    )
    clip_low: Annotated[float, Field(ge=0, lt=1)] = Field(default=0.2, description="Lower clip range of the ratio.")
    clip_high: Annotated[float, Field(ge=0)] = Field(
        default=0.2, description="Upper clip range; 0.28 is DAPO's clip-higher."
    )
    dual_clip: Annotated[float, Field(gt=1)] | None = Field(
        default=None,
        description="Lower bound c x advantage on the objective of tokens with negative advantage (c = 3 is usual).",
    )
    ratio_level: Literal["token", "sequence"] = Field(
        default="token", description="sequence: the length-normalised sequence ratio of GSPO (Eq. 7)."
    )
    log_ratio_clamp: PositiveFloat = Field(
        default=20.0,
        description="Log-ratios are clamped to plus/minus this before exp (zero gradient beyond). Our choice.",
    )
    kl_coefficient: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="Weight of KL(policy || reference) in the loss."
    )
    kl_kind: Literal["k1", "k2", "k3"] = Field(default="k3", description="KL estimator, per token.")
    kl_cap: PositiveFloat | None = Field(
        default=None, description="Cap on the magnitude of the per-token KL estimate; none by default. Our choice."
    )
    entropy_coefficient: float = Field(default=0.0, description="Weight of the mean entropy subtracted from the loss.")
    importance_cap: PositiveFloat | None = Field(
        default=None,
        description="Truncated importance correction: weight each token's clipped objective by "
        "min(policy_old / engine, cap).",
    )
    overlong_buffer: PositiveInt | None = Field(
        default=None,
        description="DAPO's soft overlong penalty over the last that many tokens before rollout.max_tokens.",
    )
    overlong_penalty: Annotated[float, Field(ge=0)] = Field(default=1.0, description="Penalty at full overlength.")
    dynamic_sampling: bool = Field(
        default=False,
        description="Drop groups whose rewards are all equal and sample further prompts in their place (DAPO).",
    )
    max_generation_batches: PositiveInt = Field(
        default=10,
        description="Bound on generation batches per step under dynamic_sampling; then the step trains on what it has.",
    )

    def refusals(self, run: RunSettings) -> Iterator[Refusal]:
        if self.aggregation_constant is not None and self.aggregation != "constant":
            yield Refusal(
                f"algorithm.aggregation_constant={self.aggregation_constant:g}",
                f"has no effect with algorithm.aggregation={self.aggregation}",
                "set algorithm.aggregation=constant or remove it",
            )
        if self.overlong_buffer is not None and self.overlong_buffer >= run.rollout.max_tokens:
            yield Refusal(
                f"algorithm.overlong_buffer={self.overlong_buffer}",
                f"must be below rollout.max_tokens={run.rollout.max_tokens}",
                "shorten the buffer or allow longer responses",
            )
        if run.rollout.group_size > 1:
            return
        if self.dynamic_sampling:
            yield Refusal(
                "algorithm.dynamic_sampling=true",
                "drops every group of rollout.group_size=1, whose rewards are always all equal",
                "set rollout.group_size to 2 or more",
            )
        if self.singleton_advantage == "zero":
            yield Refusal(
                "rollout.group_size=1",
                "gives every answer the advantage 0, from which nothing is learned",
                "set rollout.group_size to 2 or more, or algorithm.singleton_advantage=reward",
            )


class GrpoSettings(GroupRelativeSettings):
    """GRPO and its family. The defaults are GRPO's advantage with DAPO's token mean, without a KL term."""

    name: Literal["grpo"] = "grpo"
