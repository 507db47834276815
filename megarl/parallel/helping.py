"""What a process does that helps another (`megarl.parallel.helper`): its signals, its pipes, its last resort."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from megarl.parallel import terminal

#: A scheduler or a terminal sends them to every process of a run; what a helper works on then is still wanted.
ENDING = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def take_pipes() -> tuple[TextIO, TextIO]:
    """Requests and replies: standard input and output are taken away for them, and what the user's code prints goes to
    standard error. From now on the end comes by the pipe alone.
    """
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)
    requests = os.fdopen(os.dup(0), "r", encoding="utf-8", newline="\n")
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8", newline="\n")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    # Code that prints must not fail because nobody reads it.
    terminal.keep()
    return requests, replies


def send(replies: TextIO, message: dict[str, Any]) -> None:
    """Write a reply."""
    replies.write(json.dumps(message) + "\n")
    replies.flush()


@contextmanager
def backstop(seconds: float) -> Iterator[None]:
    """End this process where the block takes that long.

    Whoever asks enforces the time limit. This alarm, which no Python code can delay because it has no handler, ends a
    hanging process whose parent was killed first.
    """
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
