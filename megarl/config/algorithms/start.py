"""Settings of START."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from megarl.config.algorithms.grpo import GroupRelativeSettings
from megarl.config.parameter_sets import REFERENCE, ParameterSet
from megarl.config.sections import RunSettings
from megarl.errors import Refusal


class StartSettings(GroupRelativeSettings):
    """START (arXiv 2603.20799): the thinking is trained first, on the reward of the answer, then the response.

    Published in full is the idea alone; every setting here is our choice. Advantages, ratio, clip, KL and aggregation
    are those of grpo, over the trained tokens.
    """

    takes_turns: ClassVar[bool] = False

    name: Literal["start"] = "start"
    thinking_steps: NonNegativeInt | None = Field(
        default=None,
        description="Steps of stage 1, which trains the thinking, before stage 2; none: the whole run. Our choice.",
    )
    second_stage: Literal["response", "full"] = Field(
        default="response", description="What stage 2 trains: the response alone, or thinking and response. Our choice."
    )
    responder: Literal["policy", "initial"] = Field(
        default="policy",
        description="Who writes the responses in stage 1: the policy, whose response tokens are then not trained, or "
        "the policy that the run started with, which cannot learn a shortcut. Our choice.",
    )
    responses: PositiveInt = Field(
        default=1, description="Responses per thinking in stage 1; its reward is their mean. Our choice."
    )
    normalizer: Literal["trained", "response"] = Field(
        default="trained",
        description="What token means divide by: the tokens that are trained, or all tokens of the outputs, with which "
        "the gradients of both parts add up to the whole. Our choice.",
    )

    @property
    def answers_in_parts(self) -> bool:
        return self.thinking_steps != 0 and (self.responder != "policy" or self.responses > 1)

    def parameter_sets(self, run: RunSettings) -> tuple[ParameterSet, ...]:
        responds = self.answers_in_parts and self.responder == "initial"
        return super().parameter_sets(run) + ((ParameterSet(REFERENCE, generates=True),) if responds else ())

    def refusals(self, run: RunSettings) -> Iterator[Refusal]:
        yield from super().refusals(run)
        for name, part in run.reward.named_parts():
            if part.graded != "response":
                yield Refusal(
                    f"{name}.graded={part.graded}",
                    "must be response: the reward may not see the thinking that it is to judge by its answer",
                    f"set {name}.graded=response",
                )
        if self.normalizer == "response" and self.aggregation == "sequence_mean":
            yield Refusal(
                "algorithm.normalizer=response with algorithm.aggregation=sequence_mean",
                "has no one divisor for both parts of an output",
                "use token_mean or constant, or algorithm.normalizer=trained",
            )
        if self.second_stage == "full" and self.thinking_steps is None:
            yield Refusal(
                "algorithm.second_stage=full",
                "has no effect without algorithm.thinking_steps, since the whole run is stage 1",
                "set algorithm.thinking_steps, or remove it",
            )
        if self.thinking_steps == 0 and (self.responder != "policy" or self.responses != 1):
            yield Refusal(
                "algorithm.thinking_steps=0",
                "leaves no stage 1 for algorithm.responder and algorithm.responses to work in",
                "remove these two, or let stage 1 last longer",
            )
