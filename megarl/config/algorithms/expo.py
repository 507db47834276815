"""Settings of ExPO: ExP-GRPO and ExP-DPO."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveFloat

from megarl.config.algorithms.base import AlgorithmSettings, ExplanationSettings
from megarl.config.algorithms.grpo import GroupRelativeSettings
from megarl.config.base import without_effect
from megarl.config.parameter_sets import REFERENCE, ParameterSet
from megarl.config.sections import RunSettings
from megarl.errors import Refusal


class ExpGrpoSettings(GroupRelativeSettings):
    """ExP-GRPO (arXiv 2507.02834): GRPO plus the likelihood of self-explanations.

    The objective's GRPO part takes means over sequences, as the paper's does.
    """

    name: Literal["exp_grpo"] = "exp_grpo"
    aggregation: Literal["token_mean", "sequence_mean", "constant"] = Field(
        default="sequence_mean", description="As for grpo; the paper's objective is the mean per sequence."
    )
    kl_coefficient: Annotated[float, Field(ge=0)] = Field(
        default=0.001, description="Weight of KL(policy || reference) in the loss. Our choice."
    )
    explanation_weight: Annotated[float, Field(ge=0)] = Field(
        default=0.04, description="beta, the weight of the explanations' log-likelihood; 0 is GRPO (paper: 0.04)."
    )
    explanation_aggregation: Literal["token_mean", "sum"] = Field(
        default="token_mean",
        description="token_mean: mean over all tokens of the mini-batch's explanations; sum: over each explanation, "
        "then the mean over explanations. Our choice.",
    )
    explanation: ExplanationSettings = ExplanationSettings()

    def longest_prompt(self, run: RunSettings) -> int:
        return self.explanation.longest_prompt(run) if self.explanation_weight > 0 else super().longest_prompt(run)

    def sequences_per_prompt(self, run: RunSettings) -> int:
        explained = self.explanation.per_prompt if self.explanation_weight > 0 else 0
        return super().sequences_per_prompt(run) + explained

    def refusals(self, run: RunSettings) -> Iterator[Refusal]:
        yield from super().refusals(run)
        yield from self.explanation.refusals(run)
        if self.explanation_weight == 0:
            cause, fix = "with algorithm.explanation_weight=0", "set algorithm.explanation_weight or remove it"
            yield from without_effect(self, "algorithm", ("explanation_aggregation",), cause, fix)
        if self.dynamic_sampling and self.explanation_weight > 0:
            yield Refusal(
                "algorithm.dynamic_sampling=true",
                "would drop the prompts that nobody solves, for which the explanations are made",
                "turn it off, or set algorithm.explanation_weight=0",
            )


class ExpDpoSettings(AlgorithmSettings):
    """ExP-DPO (arXiv 2507.02834): the self-explanation is preferred to the policy's own chain and answer."""

    sequences_together: ClassVar[int] = 2
    # A preference between two texts holds wherever they come from.
    draws_from_policy: ClassVar[bool] = False

    name: Literal["exp_dpo"] = "exp_dpo"
    mode: Literal["iterative", "offline"] = Field(
        default="iterative",
        description="iterative: explanations and own answers come from the current policy; offline: from the policy "
        "that the run starts with, the same ones whenever a prompt returns.",
    )
    beta: PositiveFloat = Field(default=0.1, description="Strength of the preference. Our choice.")
    rejected: Literal["any", "wrong"] = Field(
        default="any",
        description="any: the first own answer; wrong: the first that scored reward.low, prompts without one are "
        "left out and counted. Our choice.",
    )
    explanation: ExplanationSettings = ExplanationSettings()

    def longest_prompt(self, run: RunSettings) -> int:
        return self.explanation.longest_prompt(run)

    def sequences_per_prompt(self, run: RunSettings) -> int:
        """Those of a pair."""
        return self.sequences_together

    def parameter_sets(self, run: RunSettings) -> tuple[ParameterSet, ...]:
        return (ParameterSet(REFERENCE, measures=True, generates=self.mode == "offline"),)

    def refusals(self, run: RunSettings) -> Iterator[Refusal]:
        yield from self.explanation.refusals(run)
        if self.explanation.per_prompt > 1:
            yield Refusal(
                f"algorithm.explanation.per_prompt={self.explanation.per_prompt}",
                "must be 1: a pair has one chosen answer",
                "remove it",
            )
        if self.mode == "offline" and run.rollout.seeded is False:
            yield Refusal(
                "rollout.seeded=false",
                "contradicts algorithm.mode=offline, in which a prompt always gets the same answers",
                "remove it",
            )
