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
from megarl.errors import Interrupted
from megarl.parallel import terminal
from megarl.parallel.launch import KEYBOARD, at_once, forwarded_signal, started_here, stop_signals

#: Seconds within which two signals are one press of a key under torchrun: the terminal sends it to every process, and
#: torchrun once more to those that it started.
_SAME_PRESS = 1.0


class Stopping:
    """Whether this run was asked to stop, by what, and how many seconds are left."""

    def __init__(self, settings: HealthSettings) -> None:
        self._settings = settings
        self._ends: float | None = None
        self._pid = os.getpid()
        self._pressed = float("inf")
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
        """Turn the signals that ask for a stop into requests inside; the second from the keyboard ends the process."""
        # Under megarl's own launcher SIGTERM means that the processes that were started beside this one end, and all
        # that ask for a stop come as SIGUSR1.
        numbers = [signal.SIGUSR1] if started_here() else stop_signals()
        for number in numbers:
            signal.signal(number, self._on_signal)
        try:
            yield
        finally:
            # What answered them before the run does not know that it has been.
            for number in numbers:
                signal.signal(number, signal.SIG_DFL)

    def _on_signal(self, number: int, _: object) -> None:
        if os.getpid() != self._pid:
            # A process that this one forked, such as a writer of a save, has its handlers.
            return
        number = forwarded_signal() or number
        name = signal.Signals(number).name
        if number in KEYBOARD:
            if time.monotonic() - self._pressed > (_SAME_PRESS if "TORCHELASTIC_RUN_ID" in os.environ else 0):
                if _speaks():
                    terminal.say(at_once(name))
                os._exit(Interrupted.exit_code)
            self._pressed = time.monotonic()
        self.request(name, self._settings.notice if number == signal.SIGUSR1 else self._settings.term_notice)
        if _speaks():
            again = f"; a second {name} ends it at once" if number in KEYBOARD else ""
            terminal.say(f"{name}: the run stops as soon as its state is saved{again}")


def _speaks() -> bool:
    return os.environ.get("RANK", "0") == "0"
