"""What the loop needs of whatever finds rewards, and the choice among them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from megarl.config.sections import RewardSettings
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


def build_scorer(
    settings: RewardSettings,
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
