"""The terminal, or the log in its place: where a run's words go, and without which it goes on.

A terminal may be closed, the reader of a pipe may leave (`megarl train ... 2>&1 | head`), the disk behind a log may be
full. What this process prints is then lost, and nothing else is.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import sys
from collections.abc import Iterator
from typing import Any, TextIO

#: The descriptor of stderr as the process was given it.
_descriptor = 2


class _Lossy(io.RawIOBase):
    """A descriptor to write to, on which no write fails: what it does not take is lost.

    `lost` is the error of the first one that did.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.lost: OSError | None = None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: Any) -> int:
        while True:
            try:
                return os.write(self._descriptor, data)
            except BlockingIOError:
                # Whoever shares the pipe has set it so that it does not wait for its reader.
                select.select([], [self._descriptor], [])
            except OSError as error:
                self.lost = self.lost or error
                return memoryview(data).nbytes


def keep() -> None:
    """From now on let nothing that this process prints end it. Called before libraries take hold of the streams.

    Covers Python's prints, loggers and warnings, rich's displays, and the flush at the process's end; what libraries in
    C++ print fails without a word, as Python has SIGPIPE ignored. Streams that are closed become /dev/null, or the next
    file that is opened would have their number and be given what is meant for the terminal.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            # The lowest number that is free: this one.
            os.set_inheritable(null, True)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        before = getattr(sys, name)
        if before is not getattr(sys, f"__{name}__") or (before and isinstance(_raw(before), _Lossy)):
            # Somebody has put another in its place, or this one is kept.
            continue
        # A file is read by programs, whatever the terminal that it was written from.
        encoding = before.encoding if before and before.isatty() else "utf-8"
        fresh = stream(descriptor, encoding, line_buffering=before.line_buffering if before else True)
        if before:
            with contextlib.suppress(OSError):
                before.flush()
        setattr(sys, name, fresh)
        setattr(sys, f"__{name}__", fresh)


def stream(descriptor: int, encoding: str = "utf-8", *, line_buffering: bool = False) -> TextIO:
    """A stream on a descriptor, on which no write fails; characters that the encoding lacks are written as escapes."""
    buffer = io.BufferedWriter(_Lossy(descriptor))
    return io.TextIOWrapper(buffer, encoding, errors="backslashreplace", line_buffering=line_buffering)


def lost(stream: Any) -> OSError | None:
    """Why something that was printed on a kept stream is lost; None where all of it was taken."""
    raw = _raw(stream)
    return raw.lost if isinstance(raw, _Lossy) else None


def _raw(stream: Any) -> Any:
    return getattr(getattr(stream, "buffer", None), "raw", None)


def say(text: str) -> None:
    """Write a line to it, from any thread or a signal's handler."""
    _Lossy(_descriptor).write(f"megarl: {' '.join(text.split())}\n".encode(errors="backslashreplace"))


@contextlib.contextmanager
def kept_at(descriptor: int) -> Iterator[None]:
    """Inside, stderr goes elsewhere, and its own descriptor is this one."""
    global _descriptor
    before, _descriptor = _descriptor, descriptor
    try:
        yield
    finally:
        _descriptor = before
