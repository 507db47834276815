"""Stopping in time: a run that was asked to stop finishes its step, or gives it up where the time left is too short."""

from __future__ import annotations

import time

from megarl.errors import Interrupted
from megarl.health.stopping import Stopping
from megarl.parallel.exchange import gather_all


class StopAsked(Interrupted):
    """The run was asked to stop, at a point where the weights are those of the last finished step. On all ranks."""


class Stops:
    """When to stop. Knows how long steps and saves take: what does not fit into the time left is not begun."""

    def __init__(self, stopping: Stopping) -> None:
        self._stopping = stopping
        self._began = time.monotonic()
        self._step = self._save = 0.0

    def step_begins(self) -> None:
        """Start to count a step's time."""
        self._began = time.monotonic()

    def step_ends(self) -> None:
        """Take the time that the step took for that of the next."""
        self._step = time.monotonic() - self._began

    def saved(self, seconds: float) -> None:
        """Take the time that a save took for that of the next."""
        self._save = seconds

    @property
    def reason(self) -> str:
        """What asked for the stop."""
        return self._stopping.reason

    def agreed(self) -> bool:
        """Whether to stop, at the end of a step. Collective."""
        return self._stopping.agreed()

    @property
    def too_late(self) -> bool:
        """Whether this rank knows that the step under way does not end in time. A first step's length is not known."""
        if not self._stopping.requested:
            return False
        rest = self._step - (time.monotonic() - self._began) if self._step else float("inf")
        return self._stopping.seconds_left < max(0.0, rest) + self._save

    def give_up_if(self, late: bool) -> None:
        """Raise `StopAsked` on all ranks where any of them is `late`. Collective, before anything was learned."""
        if any(gather_all(late)):
            reason = self.reason or "another rank was asked to stop"
            raise StopAsked(f"stopped at {reason}, before it was finished: start it again")
