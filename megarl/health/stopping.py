"""Being asked to stop: signals become a request that all ranks come to know, and act on together."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from megarl.config.health import HealthSettings
from megarl.parallel import terminal
from megarl.parallel.launch import forwarded_signal, started_here


class Stopping:
    """Whether this run was asked to stop, by what, and how many seconds are left."""

    def __init__(self, settings: HealthSettings) -> None:
        self._settings = settings
        self._ends: float | None = None
        self.reason = ""

    @property
    def requested(self) -> bool:
        """Whether this rank knows of a request."""
        return self._ends is not None

    @property
    def seconds_left(self) -> float:
        """Until the processes may be killed; without a request infinite."""
        return float("inf") if self._ends is None else self._ends - time.monotonic()

    def request(self, reason: str, notice: float) -> None:
        """Ask for the run to stop within `notice` seconds. A second request changes nothing but a shorter notice."""
        ends = time.monotonic() + notice
        if self._ends is None:
            self.reason = reason
        self._ends = ends if self._ends is None else min(self._ends, ends)

    def agreed(self) -> bool:
        """Whether any rank knows of a request; the same on all ranks. Collective."""
        left = torch.tensor([self.seconds_left])
        dist.all_reduce(left, op=dist.ReduceOp.MIN)
        if left.isinf().item():
            return False
        if not self.requested:
            self.request("another rank was asked to stop", left.item())
        self._ends = min(self._ends or 0.0, time.monotonic() + left.item())
        return True

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Turn SIGUSR1 and SIGTERM into requests inside."""
        notices = {signal.SIGUSR1: self._settings.notice, signal.SIGTERM: self._settings.term_notice}
        if started_here():
            # There SIGTERM means that the processes that were started beside this one end.
            del notices[signal.SIGTERM]
        for number in notices:
            signal.signal(number, self._on_signal)
        try:
            yield
        finally:
            # What answered them before the run does not know that it has been.
            for number in notices:
                signal.signal(number, signal.SIG_DFL)

    def _on_signal(self, number: int, _: object) -> None:
        number = forwarded_signal() or number
        name = signal.Signals(number).name
        self.request(name, self._settings.notice if number == signal.SIGUSR1 else self._settings.term_notice)
        if _speaks():
            terminal.say(f"{name}: the run stops as soon as its state is saved")


def _speaks() -> bool:
    return os.environ.get("RANK", "0") == "0"
