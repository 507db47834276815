"""What the loop needs of whatever finds rewards, and the choice among them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from megarl.config.rewards import RewardSettings, RewardTerm, ScoreSettings
from megarl.records import Prompt
from megarl.rewards.answers import GradedAnswer, GradingItem
from megarl.rewards.grader import Grader
from megarl.rewards.judge import Judge


class Scorer(Protocol):
    """Finds rewards of answers."""

    def grade(self, items: Sequence[GradingItem]) -> list[GradedAnswer]:
        """Rewards of `items`, in their order. Raises `ScoringStopped` where none can be found any more."""
        ...

    def begin_step(self) -> None:
        """Say that a new step begins; bounds per step start anew."""
        ...

    def take_counters(self) -> dict[str, int]:
        """What was counted since the last call, beside the answers' own counters; other names than theirs."""
        ...

    def take_first_failure(self) -> str | None:
        """A sentence about the first answer that the reward failed on, when first asked for after it; else None."""
        ...

    def close(self) -> None:
        """End processes and refuse further work. May be called more than once."""
        ...


@dataclass(frozen=True)
class Part:
    """A reward that is found for answers; of a sum, one term with its name and weight."""

    settings: ScoreSettings
    scorer: Scorer
    name: str | None = None
    weight: float = 1.0


class Scoring:
    """All that finds the rewards of answers: one reward, or several that add up.

    `bounds` are the least and the greatest reward.
    """

    def __init__(self, parts: Sequence[Part], bounds: tuple[float, float]) -> None:
        self.parts = tuple(parts)
        self.bounds = bounds

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of a sum's terms; none where there is one reward."""
        return tuple(part.name for part in self.parts if part.name is not None)

    def total(self, rewards: Sequence[float | None]) -> float | None:
        """The reward of an answer by what each part gave it; None where one gave none."""
        known = [reward for reward in rewards if reward is not None]
        if len(known) < len(self.parts):
            return None
        low, high = self.bounds
        return min(max(sum(part.weight * one for part, one in zip(self.parts, known, strict=True)), low), high)

    @property
    def of_truncated(self) -> float | None:
        """The reward of an answer that was cut, whatever it says; None where a part looks at it."""
        if any(part.settings.truncated != "zero" for part in self.parts):
            return None
        return self.total([part.settings.low for part in self.parts])

    def begin_step(self) -> None:
        """A new step begins; bounds per step start anew."""
        for part in self.parts:
            part.scorer.begin_step()

    def take_counters(self) -> dict[str, int]:
        """What all parts counted since the last call, beside the answers' own counters."""
        return dict(sum((Counter(part.scorer.take_counters()) for part in self.parts), Counter()))

    def take_first_failure(self) -> str | None:
        """A sentence about the first answer that a part failed on, when first asked for after it; else None."""
        return next(filter(None, [part.scorer.take_first_failure() for part in self.parts]), None)

    def close(self) -> None:
        """End processes and refuse further work. May be called more than once."""
        for part in self.parts:
            part.scorer.close()


def build_scoring(
    settings: RewardSettings,
    replicas: int = 1,
    on_wait: Callable[[str], None] | None = None,
    section: str = "reward",
    first: Prompt | None = None,
) -> Scoring:
    """What finds the rewards of `settings`, a sum included; arguments and refusals are those of `build_scorer`."""
    parts = []
    try:
        for name, one in settings.named_parts(section):
            scorer = build_scorer(one, replicas, on_wait, name, first)
            is_term = isinstance(one, RewardTerm)
            parts.append(Part(one, scorer, one.name, one.weight) if is_term else Part(one, scorer))
    except BaseException:
        Scoring(parts, settings.bounds).close()
        raise
    return Scoring(parts, settings.bounds)


def build_scorer(
    settings: ScoreSettings,
    replicas: int = 1,
    on_wait: Callable[[str], None] | None = None,
    section: str = "reward",
    first: Prompt | None = None,
) -> Scorer:
    """The scorer of `settings.kind` for one of `replicas` engine replicas, which share the judge's cost cap.

    `section` names the settings in messages. `on_wait` gets a sentence whenever the run waits for the judge. `first` is
    a row of the data, with which a function of the user's own is tried, its reference standing for the response. Raises
    `Refusal` where the reward function cannot be imported or used, or the judge cannot be.
    """
    if settings.kind == "judge":
        return Judge(settings, replicas, on_wait, section)
    trial = None if first is None else GradingItem.of(first, first.solution or first.answer)
    return Grader(settings, section, trial)
