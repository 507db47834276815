"""What stands between generation and training: rollouts that were made and are not learned from yet."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from megarl.algorithms.base import Group
from megarl.errors import MegarlError
from megarl.train.groups import Rollouts


class Feed:
    """Hands out the rollouts of each step of a run of `steps` steps.

    `staleness` bounds how many steps may have learned since the weights that made a token: 0, as in every run today,
    means that a step learns only from what its own start has made. With n, rollouts are made up to n steps ahead, but
    none for a step that the run does not make. What waits is no state of the run: a checkpoint is saved where nothing
    does, see `require_empty`.
    """

    def __init__(self, steps: int, staleness: int = 0) -> None:
        self.steps, self.staleness = steps, staleness
        self._waiting: deque[Rollouts] = deque()

    def take(self, step: int, make: Callable[[int], Rollouts]) -> Rollouts:
        """The rollouts that step `step` learns from; `make` makes those of a step with the weights as they are now.

        Raises `MegarlError` where tokens are older than `staleness` allows.
        """
        last = max(step, min(step + self.staleness, self.steps))
        for ahead in range(step + len(self._waiting), last + 1):
            self._waiting.append(make(ahead))
        rollouts = self._waiting.popleft()
        oldest = min((v for v in map(_oldest_version, rollouts.kept.groups) if v is not None), default=None)
        if oldest is not None and step - 1 - oldest > self.staleness:
            raise MegarlError(
                f"step {step} would learn from tokens that the weights after step {oldest} made, {step - 1 - oldest} "
                f"steps before it: the bound is {self.staleness}"
            )
        return rollouts

    def require_empty(self) -> None:
        """Raise `MegarlError` where rollouts wait, which no checkpoint can hold."""
        if self._waiting:
            raise MegarlError(f"{len(self._waiting)} steps' rollouts wait in the feed, which no checkpoint can hold")


def _oldest_version(group: Group) -> int | None:
    """The oldest version of the policy's weights that wrote in a group; None where none is known."""
    stretches = (stretch for head in group.heads for stretch in head.stretches if stretch.source == "policy")
    return min((stretch.version for stretch in stretches if stretch.version is not None), default=None)
