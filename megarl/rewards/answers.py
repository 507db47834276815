"""What scorers take and give: one response to score, and its reward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megarl.records import Prompt


@dataclass(frozen=True, slots=True)
class GradingItem:
    """One response to grade.

    `answer` is the reference, `alternatives` further references that count as right, `question` the prompt's text
    without the tokenizer's template, `extra` the cells of `data.extra_columns`.
    """

    text: str
    answer: str
    source: str = ""
    alternatives: tuple[str, ...] = ()
    question: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, prompt: Prompt, text: str) -> GradingItem:
        """The item for the response `text` to `prompt`, with all that the data set gives."""
        return cls(text, prompt.answer, prompt.source, prompt.alternatives, prompt.text, prompt.extra)

    @property
    def references(self) -> tuple[str, ...]:
        """The reference and its alternatives."""
        return self.answer, *self.alternatives


@dataclass(frozen=True, slots=True)
class GradedAnswer:
    """A reward in [reward.low, reward.high]; `counter` names what went wrong where something did.

    Counters that come with the reward `reward.low`, since it may be the answer that made the reward fail:
    grader_timeout, grader_died, grader_error (the reward function raised or gave no number), reward_out_of_range (NaN
    included).

    Counters that come with the reward None (nobody knows what the answer is worth, so it must not be trained on):
    judge_unreadable, judge_timeout, judge_error (the last of the judge's tries failed so), judge_cap (the step's
    money is spent).
    """

    reward: float | None
    counter: str | None = None
    found: str | None = field(default=None, compare=False)
    """What a rule of megarl's took for the answer."""
    why: str | None = field(default=None, compare=False)
    """Why it decided so, in words."""


def scaled(share: float, low: float, high: float) -> float:
    """`share` in [0, 1] mapped linearly to [low, high]; 0 and 1 give low and high exactly."""
    return min(max((1 - share) * low + share * high, low), high)
