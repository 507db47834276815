"""Verdicts of turns, for environments that want them: the run's reward, found while the engine goes on."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

from megarl.environments.base import Verdict
from megarl.records import FinishReason, Prompt


class Said(NamedTuple):
    """The policy's turns of a sample so far, to be graded as an answer to `prompt` that ends with the last of them, of
    which `finish_reason` is."""

    prompt: Prompt
    turns: tuple[tuple[int, ...], ...]
    finish_reason: FinishReason


#: Verdicts on the last turns of what was said. Raises `ScoringStopped`.
Grade = Callable[[Sequence[Said]], Sequence[Verdict]]


class Verdicts:
    """Grades turns in a thread, as many at a time as have come by then. Use `close()` at the end."""

    def __init__(self, grade: Grade) -> None:
        self._grade = grade
        self._asked: queue.SimpleQueue[tuple[int, Said] | None] = queue.SimpleQueue()
        self._found: queue.SimpleQueue[tuple[int, Said, Verdict] | Exception] = queue.SimpleQueue()
        self._pending = 0
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._closed = False
        threading.Thread(target=self._work, name="verdicts", daemon=True).start()

    @property
    def bell(self) -> int | None:
        """A file descriptor that can be read from when a verdict is there, None where none is awaited."""
        return self._bell if self._pending else None

    def ask(self, index: int, said: Said) -> None:
        """Find the verdict on the last turn of sample `index`."""
        self._pending += 1
        self._asked.put((index, said))

    def poll(self) -> list[tuple[int, Said, Verdict]]:
        """Verdicts that were found. Raises what finding them raised."""
        found = []
        # Silenced before anything is taken: what comes in between rings it again.
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._bell)
        while not self._found.empty():
            one = self._found.get()
            if isinstance(one, Exception):
                self._pending = 0
                raise one
            self._pending -= 1
            found.append(one)
        return found

    def close(self) -> None:
        """Find no more. May be called more than once."""
        if not self._closed:
            self._closed, self._pending = True, 0
            self._asked.put(None)

    def _work(self) -> None:
        while True:
            asked = [self._asked.get()]
            while not self._asked.empty():
                asked.append(self._asked.get())
            if None in asked:
                os.close(self._bell)
                return
            some = [one for one in asked if one is not None]
            try:
                verdicts = self._grade([said for _, said in some])
                for (index, said), verdict in zip(some, verdicts, strict=True):
                    self._found.put((index, said, verdict))
            except Exception as error:
                self._found.put(error)
            os.eventfd_write(self._bell, 1)
