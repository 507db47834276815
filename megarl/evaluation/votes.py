"""Which samples of a problem give the same answer, by the equality of the rule that grades them. Torch-free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from megarl.evaluation.answers import Row
from megarl.rewards.answers import GradingItem
from megarl.rewards.scorer import Scorer


class Group(NamedTuple):
    """An answer of a problem: the samples that give it, and whether it is right."""

    votes: int
    right: bool


class _Problem:
    """The answers of a problem, sorted into groups: the right ones are one from the start."""

    def __init__(self, rows: Sequence[Row]) -> None:
        right = sum(row["right"] for row in rows)
        self.groups = [Group(right, True)] if right else []
        texts = Counter(row["found"] for row in rows if not row["right"] and row.get("found") is not None)
        # The commonest texts first, so that few comparisons settle it.
        self._left = texts.most_common()

    @property
    def settled(self) -> bool:
        """Whether no group of those that are left could be the largest, nor as large as it."""
        most = max((group.votes for group in self.groups), default=0)
        return sum(votes for _, votes in self._left) < max(most, 1)

    def questions(self) -> list[GradingItem]:
        """Whether each text that is left, but for the first, equals that."""
        (first, _), *others = self._left
        return [GradingItem(rf"\boxed{{{text}}}", first) for text, _ in others]

    def sort(self, equal: Sequence[bool]) -> None:
        """Make a group of the first text that is left and of those that equal it."""
        (_, votes), *others = self._left
        votes += sum(count for (_, count), same in zip(others, equal, strict=True) if same)
        self._left = [one for one, same in zip(others, equal, strict=True) if not same]
        self.groups.append(Group(votes, False))


def votes(rows: Sequence[Row], scorer: Scorer, high: float) -> list[list[Group]]:
    """The groups of each problem that may be its majority.

    Two answers are one where `scorer`, which grades by a rule, takes the one for the other, that is, gives the reward
    `high`. Raises `ScoringStopped` where it cannot compare any more.
    """
    by_problem: dict[int, list[Row]] = {}
    for row in rows:
        by_problem.setdefault(row["prompt_index"], []).append(row)
    problems = [_Problem(one) for one in by_problem.values()]
    while open_ones := [one for one in problems if not one.settled]:
        asked = [one.questions() for one in open_ones]
        graded = iter(scorer.grade([item for items in asked for item in items]))
        for problem, items in zip(open_ones, asked, strict=True):
            problem.sort([next(graded).reward == high for _ in items])
    return [problem.groups for problem in problems]
