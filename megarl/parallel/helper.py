"""A Python process beside this one that runs code of the user's, as this one sees it: its pipes, its clock, its end.

It is started fresh rather than forked, because the training process holds communication and engine threads that do not
survive a fork. What runs in it is `main(*arguments)` of a module (`megarl.parallel.helping`); both talk in lines of
JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import megarl
from megarl.config import user_code

#: Seconds a process may take to import the user's code.
START_LIMIT = 300.0
#: Multiple of the time limit after which a process ends itself, should the one that would end it be gone.
BACKSTOP_FACTOR = 20.0
#: What a process runs. Its modules are those that this process would find; megarl is this one's.
_PROGRAM = """\
import importlib, json, sys
home, sys.path[:] = sys.argv[1], json.loads(sys.argv[2])
sys.path.insert(0, home)
import megarl
del sys.path[0]
sys.exit(importlib.import_module(sys.argv[3]).main(*sys.argv[4:]))
"""


class Helper:
    """A process that runs `main(*arguments)` of `module`."""

    def __init__(self, module: str, *arguments: str) -> None:
        home = str(Path(megarl.__file__).resolve().parent.parent)
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        # What megarl keeps from its own processes is no business of those that the user's code starts.
        environment.pop("PYTHONSAFEPATH", None)
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", _PROGRAM, home, json.dumps(user_code.search_path()), module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        self._received = b""

    def send(self, lines: bytes) -> bool:
        """Write to the process, which must be reading; False where it is gone."""
        try:
            self.stdin.write(lines)
            self.stdin.flush()
        except BrokenPipeError:
            return False
        return True

    def receive(self) -> list[dict[str, object]]:
        """The messages that are complete with what has arrived. Raises EOFError where the process is gone."""
        data = os.read(self.stdout.fileno(), 1 << 16)
        if not data:
            raise EOFError
        *lines, self._received = (self._received + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def ended(self) -> str:
        """How the process, which is no more, has ended."""
        code = self.process.returncode
        return f"exit status {code}" if code >= 0 else signal.Signals(-code).name

    def kill(self) -> None:
        """End the process whatever it does, and release its pipes."""
        self.process.kill()
        self.process.wait()
        self.stdout.close()
        with contextlib.suppress(BrokenPipeError):  # bytes it never read may still be buffered
            self.stdin.close()


class Deadline:
    """A limit of `seconds`, from now on, on what process `pid` is about to do.

    For a process that wants to run, the limit is one of processor time: on a crowded machine an answer would otherwise
    score by what else happens to run. A process that sleeps has no such excuse.
    """

    def __init__(self, pid: int, seconds: float) -> None:
        self._pid, self.seconds = pid, seconds
        self._used = _activity(pid)[1]
        self.at = time.monotonic() + seconds
        """When to ask again whether it has passed, on the clock `time.monotonic`."""

    def passed(self) -> bool:
        """Whether the limit has passed."""
        now = time.monotonic()
        if now < self.at:
            return False
        state, used = _activity(self._pid)
        left = self.seconds - (used - self._used)
        if state not in "RD" or left <= 0:
            return True
        self.at = now + max(left, 0.01)
        return False


def _activity(pid: int) -> tuple[str, float]:
    """A process's state letter and the processor seconds it has used; ("?", 0.0) where nothing says so."""
    try:
        # The name, in brackets, may hold anything; state is the first field after it, the times the 12th and 13th.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return "?", 0.0
    return fields[0], (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
