"""What the loop needs of whatever finds rewards, and the choice among them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from megarl.config.sections import RewardSettings
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

    def close(self) -> None:
        """End processes and refuse further work. May be called more than once."""
        ...


def build_scorer(settings: RewardSettings, replicas: int = 1, on_wait: Callable[[str], None] | None = None) -> Scorer:
    """The scorer of `settings.kind` for one of `replicas` engine replicas, which share the judge's cost cap.

    `on_wait` gets a sentence whenever the run waits for the judge. Raises `Refusal` where the reward function cannot be
    imported, or the judge cannot be used.
    """
    return Judge(settings, replicas, on_wait) if settings.kind == "judge" else Grader(settings)
