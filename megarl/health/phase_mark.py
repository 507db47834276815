"""The phase that a process is in, where its neighbours can read it when it can no longer say so."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

_SIZE = 32


class PhaseMark:
    """A small file of this host with the process's phase, written as the phase begins: no message is as fresh."""

    def __init__(self) -> None:
        self._file = _file(os.getpid())
        self._handle = os.open(self._file, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600)

    def set(self, phase: str) -> None:
        """Say which phase begins."""
        os.pwrite(self._handle, phase.encode().ljust(_SIZE), 0)

    def remove(self) -> None:
        """Leave nothing behind."""
        self._file.unlink(missing_ok=True)
        os.close(self._handle)


def phase_of(pid: int) -> str | None:
    """The phase that a process of this host was in last; None where it has left no mark."""
    try:
        return _file(pid).read_bytes().decode().strip() or None
    except OSError:
        return None


def forget(pid: int) -> None:
    """Remove the mark of a process that is gone."""
    _file(pid).unlink(missing_ok=True)


def _file(pid: int) -> Path:
    return Path(tempfile.gettempdir(), f"megarl-{os.getuid()}-{pid}.phase")
