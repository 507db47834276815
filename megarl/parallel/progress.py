"""What this process is doing, for whoever watches over the run: its phase, and signs of progress within it.

One record per process, as there is one thread that does the work; a sign costs less than a microsecond.
"""

from __future__ import annotations

import time
from collections.abc import Callable


class Progress:
    """The phase, and when it last moved. Read by other threads, written by the one that works."""

    def __init__(self) -> None:
        self.phase = "start"
        self.number = 0
        """How many phases were entered before this one."""
        self.moved = time.monotonic()
        self.longest: dict[str, float] = {}
        """Of phases that were left: the longest pause between two signs of progress in them, in seconds."""
        self.on_enter: Callable[[], object] = lambda: None
        """Called with every new phase."""
        self._pause = 0.0

    def enter(self, phase: str) -> None:
        """Say which phase begins."""
        self.tick()
        self.longest[self.phase] = max(self._pause, self.longest.get(self.phase, 0.0))
        self._pause = 0.0
        self.phase, self.number = phase, self.number + 1
        self.on_enter()

    def tick(self) -> None:
        """Say that the phase goes on."""
        now = time.monotonic()
        self._pause = max(self._pause, now - self.moved)
        self.moved = now


CURRENT = Progress()
enter, tick = CURRENT.enter, CURRENT.tick
