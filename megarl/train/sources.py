"""The numbers of answers apart by the source of their prompts."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean

from megarl.config.rewards import RewardSettings
from megarl.records import Prompt

#: Names of extra columns that say how hard a problem is.
LEVELS = ("level", "difficulty")


def level_of(prompt: Prompt) -> str | None:
    """What an extra column of the data calls the problem's level; None where there is none. Fractions are rounded to
    tenths, so that few are different."""
    cell = next((cell for name in LEVELS if (cell := prompt.extra.get(name)) is not None), None)
    return f"{cell:.1f}" if isinstance(cell, float) else str(cell) if isinstance(cell, str | int) else None


def above_middle(rewards: list[float], settings: RewardSettings) -> float | None:
    """Accuracy: the share of rewards above the middle of their range; None where there is no reward."""
    middle = sum(settings.bounds) / 2
    return sum(reward > middle for reward in rewards) / len(rewards) if rewards else None


def by_source(
    answers: Iterable[tuple[str, float | None]], settings: RewardSettings, prefix: str = "", detail: str = ""
) -> dict[str, dict[str, float]]:
    """Numbers of answers, each with its source and its reward, by name of the source in order.

    `answers_by_source` counts those with a reward; `accuracy_by_source` and `reward_mean_by_source` are of these, and
    lack a source where there are none. `prefix` stands before the accuracy's name, `detail` before the others.
    """
    found: dict[str, list[float]] = {}
    for source, reward in answers:
        rewards = found.setdefault(source, [])
        if reward is not None:
            rewards.append(reward)
    scored = {source: rewards for source, rewards in sorted(found.items()) if rewards}
    return {
        f"{prefix}accuracy_by_source": {source: above_middle(r, settings) or 0.0 for source, r in scored.items()},
        f"{detail}reward_mean_by_source": {source: fmean(rewards) for source, rewards in scored.items()},
        f"{detail}answers_by_source": {source: len(rewards) for source, rewards in sorted(found.items())},
    }
