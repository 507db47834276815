"""Runs of the command line, each forked from this process, which has imported what they need: they start at once."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

#: Seconds for the last processes of a run to go after the one that was started first.
GOES = 10.0


#: What a run imports, also in its course: datasets, plots and the engine's model are imported where they are needed.
IMPORTS = [
    "megarl.cli.main",
    "megarl.train.run",
    "megarl.policy.cpu_layers",
    "megarl.rollout.cpu_worker",
    "vllm.model_executor.models.qwen2",
    "datasets",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
]


def preload() -> None:
    """Import what runs need. Slow."""
    import gc
    import importlib

    for name in IMPORTS:
        importlib.import_module(name)
    # What is there now, every run shares: it need not look through it again, which takes seconds.
    gc.collect()
    gc.freeze()


@dataclass
class Started:
    """A process of a run, first of a session of its own. `log`: all that it and its children print."""

    pid: int
    log: Path
    began: float = field(default_factory=time.time)
    code: int | None = None
    ended: float = 0.0

    def poll(self) -> bool:
        """Whether it has ended; `code` and `ended` are then set."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code, self.ended = os.waitstatus_to_exitcode(status), time.time()
        return self.code is not None

    def text(self) -> str:
        """What was printed so far."""
        return self.log.read_text(errors="replace", encoding="utf-8") if self.log.is_file() else ""

    def left_over(self) -> list[int]:
        """Processes of its session that are still there."""
        return [pid for pid in _sessions().get(self.pid, []) if pid != self.pid or self.code is None]

    def kill(self) -> None:
        """End all of its session."""
        for pid in self.left_over():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        while not self.poll():
            time.sleep(0.01)


def start(
    arguments: Sequence[str],
    folder: Path,
    log: Path,
    *,
    environment: Mapping[str, str] | None = None,
    prepare: Callable[[], None] = lambda: None,
) -> Started:
    """`megarl ARGUMENTS` in `folder`; `prepare` is called in the new process first."""
    sys.stdout.flush()
    sys.stderr.flush()
    log.unlink(missing_ok=True)
    pid = os.fork()
    if pid:
        return Started(pid, log)
    code = 1
    try:
        os.setsid()
        os.chdir(folder)
        for stream, target, flags in ((0, os.devnull, os.O_RDONLY), (1, log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)):
            opened = os.open(target, flags, 0o644)
            os.dup2(opened, stream)
            os.close(opened)
        os.dup2(1, 2)
        os.environ.update(environment or {})
        prepare()
        code = _call_main(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _call_main(arguments: Sequence[str]) -> int:
    from megarl.cli.main import main

    sys.argv = ["megarl", *arguments]
    try:
        main()
    except SystemExit as left:
        return left.code if isinstance(left.code, int) else int(left.code is not None)
    return 0


def wait(runs: Sequence[Started], until: Callable[[], bool]) -> bool:
    """Wait for all to end while `until` is false; whether they did, with all of their children."""
    # Each is asked, so that the time of its end is known.
    while sum(run.poll() for run in runs) < len(runs):
        if until():
            return False
        time.sleep(0.01)
    end = time.monotonic() + GOES
    while any(run.left_over() for run in runs):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def _sessions() -> dict[int, list[int]]:
    """All processes that live, by session."""
    found: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] not in "ZX":
            found.setdefault(int(fields[3]), []).append(int(folder.name))
    return found
