"""Settings of NFT."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from megarl.config.algorithms.base import AlgorithmSettings, undropped_refusals
from megarl.config.base import without_effect
from megarl.config.sections import RunSettings
from megarl.errors import Refusal


class NftSettings(AlgorithmSettings):
    """Negative-aware fine-tuning (arXiv 2505.18116). The defaults are those of its published code.

    RFT is `negative_weight` 0 with `prompt_weight` one.
    """

    name: Literal["nft"] = "nft"
    prompt_weight: Literal["one_minus_rate", "sqrt_odds", "one"] = Field(
        default="one_minus_rate",
        description="Weight of a prompt with the success rate r: 1 - r (Dr. GRPO's gradient), sqrt((1 - r) / r) "
        "(GRPO's), or 1.",
    )
    # These two bounds keep the gradient finite in float32, which has room up to e^88.
    epsilon: Annotated[float, Field(ge=1e-6)] = Field(
        default=1.0,
        description="Least value of the implicit negative policy's ratio inside the logarithm; the gradient passes.",
    )
    negative_weight: Annotated[float, Field(ge=0)] = Field(
        default=1.0, description="Weight of the negative part; 0 leaves the right answers alone."
    )
    rewards: Literal["binary", "continuous"] = Field(
        default="binary",
        description="binary: every reward is 0 or 1, groups with others are dropped and counted; continuous: rewards "
        "between 0 and 1 share an answer between both parts. continuous is our choice.",
    )
    rate_clamp: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        default=0.02, description="The success rate is kept between this and 1 minus this (published code)."
    )
    ratio_level: Literal["token", "sequence"] = Field(
        default="token",
        description="sequence: one ratio per answer, exp of the mean log-ratio of its tokens. The published code has "
        "such a variant; the mean is our choice.",
    )
    log_ratio_clamp: Annotated[float, Field(gt=0, le=50)] = Field(
        default=10.0,
        description="Log-ratios are bounded from above by this, without gradient beyond (published code).",
    )
    aggregation: Literal["constant", "token_mean"] = Field(
        default="constant",
        description="constant: sum over tokens / (sequences x aggregation_constant), where the published code does not "
        "divide by the sequences; token_mean: sum / tokens of the mini-batch. Our choice.",
    )
    aggregation_constant: PositiveFloat = Field(
        default=1000.0, description="Divisor of aggregation=constant in tokens (published code)."
    )
    dynamic_sampling: bool = Field(
        default=True,
        description="Drop groups that are all right or all wrong and sample further prompts in their place.",
    )
    max_generation_batches: PositiveInt = Field(
        default=10,
        description="Bound on generation batches per step under dynamic_sampling; then the step trains on what it has.",
    )

    def refusals(self, run: RunSettings) -> Iterator[Refusal]:
        if self.aggregation != "constant":
            cause = f"with algorithm.aggregation={self.aggregation}"
            fix = "set algorithm.aggregation=constant or remove it"
            yield from without_effect(self, "algorithm", ("aggregation_constant",), cause, fix)
        if not self.dynamic_sampling:
            yield from undropped_refusals(self, run)
        low, high = run.reward.bounds
        if (low, high) != (0.0, 1.0):
            yield Refusal(
                f"reward.low={low:g}, reward.high={high:g}",
                "must be 0 and 1, since NFT reads a reward as the probability of being right",
                "let the terms add up to that" if run.reward.terms else "remove both settings",
            )
        if self.rewards == "binary" and run.reward.kind in ("f1", "judge", "sum"):
            yield Refusal(
                f"algorithm.rewards=binary with reward.kind={run.reward.kind}",
                "needs rewards that are 0 or 1",
                "set algorithm.rewards=continuous",
            )
        if run.rollout.group_size < 2:
            yield Refusal(
                f"rollout.group_size={run.rollout.group_size}",
                "gives no group that is both right and wrong, from which alone NFT learns",
                "set rollout.group_size to 2 or more",
            )
