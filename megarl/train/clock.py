"""Wall-clock seconds per phase of a step, and which phase it is, for those who watch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from megarl.parallel import progress

#: Seconds below which a pause between two phases of one name is none: our choice.
PAUSE = 0.005


class Interval(NamedTuple):
    """When a phase went: seconds from where the ranks' clocks were last aligned, and how many it took."""

    name: str
    start: float
    seconds: float


class Clock:
    """Adds up seconds by phase name; `on_phase` is told each phase as it begins (the progress display).

    A phase inside another is not counted for the outer one, so that all seconds add up to those that passed.
    """

    def __init__(self, on_phase: Callable[[str], None] = lambda _: None) -> None:
        self._on_phase = on_phase
        self._seconds: dict[str, float] = {}
        self._inside = [0.0]
        self._names = ["step"]
        self._zero = time.perf_counter()
        self._intervals: list[Interval] = []

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
            self._note(name, start - self._zero, passed)
            self._names.pop()
            progress.enter(self._names[-1])

    def count(self, name: str, seconds: float) -> None:
        """Count a part of the present phase's time under another name."""
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds
        self._inside[-1] += seconds

    def _note(self, name: str, start: float, seconds: float) -> None:
        last = self._intervals[-1] if self._intervals else None
        if last is not None and last.name == name and 0 <= start - last.start - last.seconds < PAUSE:
            self._intervals[-1] = last._replace(seconds=start + seconds - last.start)
        else:
            self._intervals.append(Interval(name, start, seconds))

    def align(self) -> None:
        """Count from now on. Called by all ranks as they leave a collective, which is one moment on all of them, also
        where their hosts' clocks differ."""
        self._zero = time.perf_counter()

    def take_intervals(self) -> list[Interval]:
        """When the phases went since the last call, by their start; one inside another comes after it."""
        intervals, self._intervals = self._intervals, []
        return sorted(intervals, key=lambda one: (one.start, -one.seconds))

    def take(self) -> dict[str, float]:
        """The seconds counted since the last call, by phase."""
        seconds, self._seconds = self._seconds, {}
        return seconds
