"""Why a comparison came out as it did: what its decisive steps noted on the way.

The comparison itself is not told who listens, so that explaining an answer and grading it are one thing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

#: Notes that are kept of one comparison, the last ones, and characters that are shown of a text. Our choices.
KEPT, SHOWN = 3, 60

_NOTES: ContextVar[deque[str] | None] = ContextVar("notes", default=None)


@contextmanager
def listening() -> Iterator[deque[str]]:
    """Inside, notes are kept; the last `KEPT` are what is yielded."""
    notes: deque[str] = deque(maxlen=KEPT)
    token = _NOTES.set(notes)
    try:
        yield notes
    finally:
        _NOTES.reset(token)


def decided(equal: bool, reason: str, *texts: str) -> bool:
    """`equal`, noted with its reason, in which each {} stands for one of the texts."""
    notes = _NOTES.get()
    if notes is not None:
        notes.append(reason.format(*map(shown, texts)))
    return equal


def shown(text: str) -> str:
    """As much of a text as a note can hold."""
    line = " ".join(text.split())
    return f"`{line}`" if len(line) <= SHOWN else f"`{line[:SHOWN]}...`"
