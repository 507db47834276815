"""One grading process as the training process sees it: its pipes, its clock, the answer it works on."""

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

#: Seconds a process may take to import its reward function.
START_LIMIT = 300.0
#: Multiple of the time limit after which a process ends itself, should this one be gone.
BACKSTOP_FACTOR = 20.0
#: What a grading process runs. Its modules are those that this process would find; megarl is this one's.
_PROGRAM = """\
import json, sys
home, sys.path[:] = sys.argv[1], json.loads(sys.argv[2])
sys.path.insert(0, home)
import megarl
del sys.path[0]
import megarl.rewards.worker
sys.exit(megarl.rewards.worker.main(sys.argv[3], float(sys.argv[4])))
"""


class GradingProcess:
    """One grading process and the answer it works on."""

    def __init__(self, kind: str, time_limit: float) -> None:
        home = str(Path(megarl.__file__).resolve().parent.parent)
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        # What megarl keeps from its own processes is no business of those that a reward function starts.
        environment.pop("PYTHONSAFEPATH", None)
        backstop = str(time_limit * BACKSTOP_FACTOR)
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", _PROGRAM, home, json.dumps(user_code.search_path()), kind, backstop],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        self.ready = False
        self.tries = False
        """Whether it is at its function's first call."""
        self.item: int | None = None
        self.deadline = time.monotonic() + START_LIMIT
        self.limit, self.started_at = START_LIMIT, 0.0
        self.received = b""

    def assign(self, item: int | None, request: bytes, time_limit: float) -> bool:
        """Send the request of item number `item`, None for the first call; False where the process is gone.

        The process is waiting for a request, so it reads this one at once, however long it is.
        """
        self.item = item
        self.deadline = time.monotonic() + time_limit
        self.limit, self.started_at = time_limit, self._activity()[1]
        try:
            self.stdin.write(request)
            self.stdin.flush()
        except BrokenPipeError:
            return False
        return True

    def overdue(self) -> bool:
        """Whether the time limit has passed.

        For a process that wants to run, the limit is one of processor time: on a crowded machine an answer would
        otherwise score by what else happens to run. A process that sleeps has no such excuse.
        """
        now = time.monotonic()
        if now < self.deadline:
            return False
        state, processor_seconds = self._activity()
        left = self.limit - (processor_seconds - self.started_at)
        if state not in "RD" or left <= 0:
            return True
        self.deadline = now + max(left, 0.01)
        return False

    def _activity(self) -> tuple[str, float]:
        """The process's state letter and the processor seconds it has used; ("?", 0.0) where nothing says so."""
        try:
            # The name, in brackets, may hold anything; state is the first field after it, the times the 12th and 13th.
            fields = Path(f"/proc/{self.process.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        except OSError:
            return "?", 0.0
        return fields[0], (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def receive(self) -> dict[str, object] | None:
        """The message that arrived, or None where it is not complete yet. Raises EOFError where the process is gone."""
        data = os.read(self.stdout.fileno(), 1 << 16)
        if not data:
            raise EOFError
        self.received += data
        line, newline, rest = self.received.partition(b"\n")
        if not newline:
            return None
        self.received = rest
        return json.loads(line)

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
