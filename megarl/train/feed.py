"""What stands between generation and training: groups that a step has begun and the next one learns from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from megarl.algorithms.base import Group
from megarl.errors import MegarlError
from megarl.records import Prompt
from megarl.train import waiting
from megarl.train.groups import Begun


class Feed:
    """Holds what waits, at most the groups of one step, by `rollout.ahead`: 0, where every step learns from what it has
    made itself, or 1. What waits is a state of the run (`megarl.train.carry.Sharded`)."""

    def __init__(self, ahead: int, place: waiting.Place, prompts: Iterable[Prompt]) -> None:
        self.ahead, self._place, self._prompts = ahead, place, prompts
        self._waiting: Begun | None = None

    def exchange(self, begun: Begun | None) -> Begun | None:
        """Let `begun` wait for the next step; what has waited until now."""
        waited, self._waiting = self._waiting, begun
        return waited

    @property
    def waiting(self) -> Begun | None:
        """What waits."""
        return self._waiting

    def require_fresh(self, step: int, groups: Iterable[Group]) -> None:
        """Raise `MegarlError` where step `step` would learn from tokens of older weights than `ahead` allows."""
        oldest = min((version for group in groups for version in _versions(group)), default=step - 1)
        if step - 1 - oldest > self.ahead:
            raise MegarlError(
                f"step {step} would learn from tokens that the weights after step {oldest} made, {step - 1 - oldest} "
                f"steps before it: the bound is {self.ahead}"
            )

    # --- a state of the run -----------------------------------------------------------------------------------------

    def state(self) -> Begun | None:
        """What waits; a value that later steps do not change."""
        return self._waiting

    def write(self, state: Begun | None, folder: Path) -> None:
        """This rank's part of what waited when `state` was returned."""
        if state is not None:
            waiting.write(state, folder, self._place)

    def read(self, folder: Path) -> None:
        """Let what was saved wait again, whatever the ranks that saved it."""
        by_index: Mapping[int, Prompt] = {prompt.index: prompt for prompt in self._prompts}
        self._waiting = waiting.read(folder, self._place, by_index)


def _versions(group: Group) -> Iterable[int]:
    """The known versions of the policy's weights that wrote in a group."""
    stretches = (stretch for head in group.heads for stretch in head.stretches if stretch.source == "policy")
    return (stretch.version for stretch in stretches if stretch.version is not None)
