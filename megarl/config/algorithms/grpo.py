"""Settings of GRPO, and of the algorithms whose rollout term is GRPO's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from megarl.config.algorithms.base import AlgorithmSettings, undropped_refusals
from megarl.config.base import without_effect
from megarl.config.parameter_sets import REFERENCE, ParameterSet
from megarl.config.sections import RunSettings
from megarl.errors import Refusal


class ClippedSettings(AlgorithmSettings):
    """The clipped ratio objective, with the corrections and terms that go with it (arXiv 2402.03300; Dr. GRPO
    2503.20783, DAPO 2503.14476, GSPO 2507.18071)."""

    aggregation: Literal["token_mean", "sequence_mean", "constant", "token_sum"] = Field(
        default="token_mean",
        description="token_mean: sum over all tokens of the mini-batch / their count (DAPO); sequence_mean: mean per "
        "sequence, then over sequences (classic GRPO); constant: sum / (sequences x aggregation_constant) (Dr. GRPO); "
        "token_sum: the sum, which grows with the batch.",
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
    kl_kind: Literal["k1", "k2", "k3", "k1+", "k3+"] = Field(
        default="k3", description="KL estimator, per token; k1+ and k3+ have the value of k1 and k3 and k2's gradient."
    )
    kl_cap: PositiveFloat | None = Field(
        default=None, description="Cap on the magnitude of the per-token KL estimate; none by default. Our choice."
    )
    entropy_coefficient: float = Field(default=0.0, description="Weight of the mean entropy subtracted from the loss.")
    importance_cap: PositiveFloat | None = Field(
        default=None,
        description="Importance correction: weight each token's clipped objective by policy_old / engine, bounded by "
        "this from above; none: no weights.",
    )
    importance_floor: PositiveFloat | None = Field(
        default=None, description="Lower bound of the importance weight; none by default. IcePop: 0.5, with a cap of 5."
    )
    importance_level: Literal["token", "sequence"] = Field(
        default="token",
        description="policy_old / engine of each token, or the product over the answer's trained tokens.",
    )
    importance_mode: Literal["truncate", "mask"] = Field(
        default="truncate",
        description="Beyond its bounds a weight is the bound (truncate) or 0 (mask: IcePop at token level, masked "
        "importance sampling at sequence level).",
    )
    rejection_bounds: tuple[PositiveFloat, PositiveFloat] | None = Field(
        default=None,
        description="Tokens whose policy_old / engine lies outside are left out of the loss: objective, KL and "
        "entropy; the divisor stays (our choice). None: no rejection.",
    )
    rejection_level: Literal["token", "sequence", "sequence_mean", "sequence_any"] = Field(
        default="token",
        description="What is compared with rejection_bounds: each token's ratio, or, for an answer as a whole, the "
        "product of its tokens' ratios, their geometric mean, or each of them.",
    )

    def parameter_sets(self, run: RunSettings) -> tuple[ParameterSet, ...]:
        return (ParameterSet(REFERENCE, measures=True),) if self.kl_coefficient > 0 else ()

    def refusals(self, run: RunSettings) -> Iterator[Refusal]:
        yield from _unused(self)
        yield from _mismatch_refusals(self)


class GroupRelativeSettings(ClippedSettings):
    """Group-relative advantages and the clipped objective (arXiv 2402.03300; Dr. GRPO 2503.20783, DAPO 2503.14476,
    GSPO 2507.18071)."""

    advantage: Literal["grpo", "rloo", "opo", "reinforce_pp", "reinforce_pp_baseline", "pass_at_k", "pass_at_k_loo"] = (
        Field(
            default="grpo",
            description="grpo: reward less the group's mean; rloo: less the others' mean (2402.14740); opo: less the "
            "mean weighted by length (2505.23585); reinforce_pp: the reward, normalised over the step; "
            "reinforce_pp_baseline: less the group's mean, then so (2501.03262); pass_at_k: the greatest reward of "
            "the sets of pass_k samples that hold it, less that of all sets (2508.10751); pass_at_k_loo: what it adds "
            "to pass_k - 1 others (2505.15201).",
        )
    )
    pass_k: PositiveInt | None = Field(default=None, description="k of pass_at_k and pass_at_k_loo.")
    normalize_std: bool | None = Field(
        default=None,
        description="Divide advantages by the group's standard deviation: with grpo and pass_at_k by default yes, and "
        "no is Dr. GRPO; with pass_at_k_loo by default no. The others have no such choice.",
    )
    std_estimator: Literal["population", "sample"] = Field(
        default="population", description="Divide the squared deviations by n (population) or n-1 (sample)."
    )
    std_epsilon: Annotated[float, Field(ge=0)] = Field(default=1e-6, description="Added to the standard deviation.")
    singleton_advantage: Literal["zero", "reward"] = Field(
        default="zero", description="Advantage of a group with one member: 0, or its raw reward."
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

    @property
    def divides_by_std(self) -> bool:
        """Whether advantages are divided by a standard deviation, the group's or, with REINFORCE++, the step's."""
        if self.normalize_std is not None:
            return self.normalize_std
        return self.advantage not in ("rloo", "opo", "pass_at_k_loo")

    def refusals(self, run: RunSettings) -> Iterator[Refusal]:
        yield from super().refusals(run)
        if self.overlong_buffer is None:
            cause, fix = "without algorithm.overlong_buffer", "set algorithm.overlong_buffer or remove it"
            yield from without_effect(self, "algorithm", ("overlong_penalty",), cause, fix)
        if not self.dynamic_sampling:
            yield from undropped_refusals(self, run)
        if self.overlong_buffer is not None and self.overlong_buffer >= run.rollout.max_tokens:
            yield Refusal(
                f"algorithm.overlong_buffer={self.overlong_buffer}",
                f"must be below rollout.max_tokens={run.rollout.max_tokens}",
                "shorten the buffer or allow longer responses",
            )
        yield from _advantage_refusals(self, run.rollout.group_size)
        if run.rollout.group_size > 1:
            return
        if self.dynamic_sampling:
            yield Refusal(
                "algorithm.dynamic_sampling=true",
                "drops every group of rollout.group_size=1, whose rewards are always all equal",
                "set rollout.group_size to 2 or more",
            )
        if self.singleton_advantage == "zero" and self.advantage != "reinforce_pp":
            yield Refusal(
                "rollout.group_size=1",
                "gives every answer the advantage 0, from which nothing is learned",
                "set rollout.group_size to 2 or more, or algorithm.singleton_advantage=reward",
            )


class GrpoSettings(GroupRelativeSettings):
    """GRPO and its family. The defaults are GRPO's advantage with DAPO's token mean, without a KL term."""

    learns_late: ClassVar[bool] = True

    name: Literal["grpo"] = "grpo"


#: Settings that an advantage does not use, beside those of a standard deviation that it does not divide by.
_UNUSED = {
    "rloo": ("normalize_std",),
    "opo": ("normalize_std",),
    "reinforce_pp": ("normalize_std", "singleton_advantage"),
    "reinforce_pp_baseline": ("normalize_std",),
}


def _unused(settings: ClippedSettings) -> Iterator[Refusal]:
    """Settings of what another one leaves out."""
    if settings.aggregation != "constant":
        cause = f"with algorithm.aggregation={settings.aggregation}"
        fix = "set algorithm.aggregation=constant or remove it"
        yield from without_effect(settings, "algorithm", ("aggregation_constant",), cause, fix)
    if settings.kl_coefficient == 0:
        cause, fix = "with algorithm.kl_coefficient=0", "set algorithm.kl_coefficient or remove it"
        yield from without_effect(settings, "algorithm", ("kl_kind", "kl_cap"), cause, fix)


def _advantage_refusals(settings: GroupRelativeSettings, group_size: int) -> Iterator[Refusal]:
    """Settings that contradict `advantage`, or that it does not use."""
    chosen, k = f"algorithm.advantage={settings.advantage}", settings.pass_k
    yield from without_effect(settings, "algorithm", _UNUSED.get(settings.advantage, ()), f"with {chosen}")
    if not settings.divides_by_std:
        cause = f"with {chosen}" if settings.normalize_std is None else "with algorithm.normalize_std=false"
        yield from without_effect(settings, "algorithm", ("std_estimator", "std_epsilon"), cause)
    if settings.advantage not in ("pass_at_k", "pass_at_k_loo"):
        if k is not None:
            yield Refusal(
                f"algorithm.pass_k={k}",
                f"has no effect with {chosen}",
                "set algorithm.advantage=pass_at_k or pass_at_k_loo, or remove it",
            )
        return
    # With sets of all samples there is only one set, which nothing can be compared with.
    low, high = (1, group_size - 1) if settings.advantage == "pass_at_k" else (2, group_size)
    if k is None:
        yield Refusal(chosen, "needs algorithm.pass_k, the k of pass@k", "set algorithm.pass_k")
    elif not low <= k <= high and group_size > 1:
        yield Refusal(
            f"algorithm.pass_k={k}",
            f"must be {low} to {high} with {chosen} and rollout.group_size={group_size}",
            "choose it so, or change rollout.group_size",
        )


def _mismatch_refusals(settings: ClippedSettings) -> Iterator[Refusal]:
    """Importance weights and rejection that cannot do what they say. Where policy and engine agree every ratio is 1."""
    cap, floor = settings.importance_cap, settings.importance_floor
    if cap is None:
        names = ("importance_floor", "importance_level", "importance_mode")
        cause, fix = "without algorithm.importance_cap", "set algorithm.importance_cap or remove it"
        yield from without_effect(settings, "algorithm", names, cause, fix)
    if cap is not None and floor is not None and floor > cap:
        yield Refusal(
            f"algorithm.importance_floor={floor:g}",
            f"must not exceed algorithm.importance_cap={cap:g}",
            "lower it, or raise algorithm.importance_cap",
        )
    elif cap is not None and settings.importance_mode == "mask" and not (floor or 0) <= 1 <= cap:
        yield Refusal(
            "algorithm.importance_mode=mask",
            "needs bounds with 1 between them, else it leaves out every token on which policy and engine agree",
            "set algorithm.importance_cap to 1 or more and algorithm.importance_floor to 1 or less",
        )
    if settings.rejection_bounds is None:
        cause, fix = "without algorithm.rejection_bounds", "set algorithm.rejection_bounds or remove it"
        yield from without_effect(settings, "algorithm", ("rejection_level",), cause, fix)
        return
    low, high = settings.rejection_bounds
    if not low <= 1 <= high or low == high:
        yield Refusal(
            f"algorithm.rejection_bounds=[{low:g}, {high:g}]",
            "must be a lower and an upper bound with 1 between them, the ratio where policy and engine agree",
            "choose them so, as in [0.5, 2]",
        )
    if settings.rejection_level == "token" and settings.ratio_level == "sequence":
        yield Refusal(
            "algorithm.rejection_level=token with algorithm.ratio_level=sequence",
            "would leave tokens out of an answer whose ratio is one for all its tokens",
            "use another algorithm.rejection_level, or algorithm.ratio_level=token",
        )
