"""How answers get their rewards: the sections `reward` and `evaluation.reward`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, JsonValue, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from megarl.config.base import Settings
from megarl.config.servers import ServerSettings

#: Kinds that answer right or wrong, by rules of megarl's (`megarl.rewards.math`).
RULE_KINDS = ("math", "boxed", "deepscaler")
#: Kinds that call no function of the user's, for one reward.
BUILTIN_KINDS = (*RULE_KINDS, "f1", "judge")


class JudgeSettings(ServerSettings):
    """A language model that scores answers from 1 to 10 over the chat-completions protocol. All are our choice."""

    concurrency: Annotated[int, Field(ge=1, le=1000)] = Field(
        default=32, description="Requests in flight per engine replica."
    )
    retries: NonNegativeInt = Field(
        default=3, description="How often an answer is asked about again after a failed request or unreadable verdict."
    )
    temperature: NonNegativeFloat | None = Field(
        default=0.0, description="Sampling temperature of the judge; null: none is sent."
    )
    max_tokens: PositiveInt = Field(default=256, description="Longest reply in tokens; cut replies are unreadable.")
    max_tokens_name: Literal["max_tokens", "max_completion_tokens"] = Field(
        default="max_tokens", description="Name under which the server wants max_tokens."
    )
    template: str | None = Field(
        default=None,
        description="The message, with {question}, {response} and {reference} in it; default: one that asks for a "
        "sentence of reasoning and a last line `Score: N`, which every template must ask for.",
    )
    system: str | None = Field(default=None, description="System message; none: none is sent.")
    extra: dict[str, JsonValue] = Field(
        default={}, description="Further fields of the request's body, such as vLLM's structured_outputs."
    )
    max_cost_per_step: PositiveFloat | None = Field(
        default=None,
        description="What all replicas together may spend in a step, in the prices' currency; past it answers stay "
        "without reward until the next step. None: no bound.",
    )
    input_price: NonNegativeFloat = Field(default=0.0, description="Price of a million tokens sent.")
    output_price: NonNegativeFloat = Field(default=0.0, description="Price of a million tokens received.")


class ScoreSettings(Settings):
    """How an answer gets one reward."""

    kind: str = Field(
        default="math",
        description="math: the answer equals the reference, however both are written; boxed: the last \\boxed{} "
        "equals the reference as text; deepscaler: DeepScaleR's rule with math-verify, as AttnRL grades; f1: words "
        "shared with the reference; judge: scored by a language model (reward.judge); or a function of your own, "
        "package.module:function or folder/file.py:function. sum: the weighted sum of reward.terms.",
    )
    graded: Literal["whole", "response"] = Field(
        default="whole", description="What the reward sees: the whole answer, or only what follows its thinking."
    )
    judge: JudgeSettings | None = Field(default=None, description="The judge of kind judge.")
    time_limit: PositiveFloat = Field(
        default=5.0, description="Seconds per answer in a grading process; past it the answer scores 0 and is counted."
    )
    max_failed_share: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.2,
        description="Share of the answers on which the reward may fail (raise, hang, give no number in its range or no "
        "verdict) before the run stops; of the last hundred, or of those graded together where these are more. Our "
        "choice.",
    )
    workers: PositiveInt = Field(
        default=2, description="Grading processes per engine replica; boxed has one, f1 and judge none."
    )
    last_characters: PositiveInt | None = Field(
        default=None, description="The reward sees only the last that many characters; none: all."
    )
    low: float = Field(
        default=0.0, description="Least reward allowed: a wrong answer, no shared word, a judge's score of 1."
    )
    high: float = Field(
        default=1.0,
        description="Greatest reward allowed: a right answer, the reference's words, a judge's score of 10.",
    )
    truncated: Literal["score", "zero"] = Field(
        default="score",
        description="zero: a response cut at rollout.max_tokens, or a bound of rollout.environment, scores reward.low.",
    )


class RewardTerm(ScoreSettings):
    """One of several rewards that add up."""

    name: str = Field(
        description="Name under which its mean stands in metrics.jsonl.", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
    )
    weight: float = Field(default=1.0, description="Factor of its reward in the sum; below 0 it is a penalty.")


class RewardSettings(ScoreSettings):
    terms: tuple[RewardTerm, ...] = Field(
        default=(), description="The rewards of kind sum: each a table with name, weight and the settings of a reward."
    )

    def named_parts(self, section: str = "reward") -> list[tuple[str, ScoreSettings]]:
        """The rewards that are found for an answer, with their keys: the terms of a sum, else this one."""
        if not self.terms:
            return [(section, self)]
        return [(f"{section}.terms.{number}", term) for number, term in enumerate(self.terms)]

    @property
    def bounds(self) -> tuple[float, float]:
        """The least and the greatest reward: `low` and `high`, or what those of the terms add up to."""
        if not self.terms:
            return self.low, self.high
        ends = [(t.weight * t.low, t.weight * t.high) for t in self.terms]
        return sum(min(pair) for pair in ends), sum(max(pair) for pair in ends)
