"""Wall-clock seconds per phase of a step, and which phase it is, for those who watch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from megarl.parallel import progress


class Clock:
    """Adds up seconds by phase name; `on_phase` is told each phase as it begins (the progress display).

    A phase inside another is not counted for the outer one, so that all seconds add up to those that passed.
    """

    def __init__(self, on_phase: Callable[[str], None] = lambda _: None) -> None:
        self._on_phase = on_phase
        self._seconds: dict[str, float] = {}
        self._inside = [0.0]
        self._names = ["step"]

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside under `name`."""
        self._on_phase(name)
        progress.enter(name)
        self._names.append(name)
        self._inside.append(0.0)
        start = time.perf_counter()
        try:
            yield
        finally:
            passed = time.perf_counter() - start
            self._seconds[name] = self._seconds.get(name, 0.0) + passed - self._inside.pop()
            self._inside[-1] += passed
            self._names.pop()
            progress.enter(self._names[-1])

    def count(self, name: str, seconds: float) -> None:
        """Count a part of the present phase's time under another name."""
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds
        self._inside[-1] += seconds

    def take(self) -> dict[str, float]:
        """The seconds counted since the last call, by phase."""
        seconds, self._seconds = self._seconds, {}
        return seconds
