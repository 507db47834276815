"""The terminal, or the log in its place: where a run's last words go, also while what libraries print is held back."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

#: The descriptor of stderr as the process was given it.
_descriptor = 2


def say(text: str) -> None:
    """Write a line to it, from any thread. A terminal that is gone must not keep a run from its end."""
    with contextlib.suppress(OSError):
        os.write(_descriptor, f"megarl: {' '.join(text.split())}\n".encode())


@contextlib.contextmanager
def kept_at(descriptor: int) -> Iterator[None]:
    """Inside, stderr goes elsewhere, and its own descriptor is this one."""
    global _descriptor
    before, _descriptor = _descriptor, descriptor
    try:
        yield
    finally:
        _descriptor = before
