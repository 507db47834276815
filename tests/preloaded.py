"""Processes that start at once: forked by a server, one for the session, which has imported Megatron, vLLM and megarl.

What a test wants to know of a run is seldom how its process came to be. Those that do want that (the launchers, Slurm,
the console script) start a Python of their own.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import multiprocessing
import multiprocessing.context
import multiprocessing.forkserver
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS.parent / "tools"))

IMPORTS = importlib.import_module("faults.process").IMPORTS

#: With the place of megarl, and of the rewards and algorithms of tests, for processes that a forked one starts. One
#: thread each: others that a library started would not be in the fork.
_ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}


@functools.cache
def context() -> multiprocessing.context.ForkServerContext:
    """Of processes that are forked from the server, which runs."""
    if "MEGARL_TESTS_QUICK" in os.environ:
        raise RuntimeError(
            "the quick form starts no processes. Fix: mark the test, or name its file in suite_schedule.py"
        )
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(IMPORTS)
    with mock.patch.dict(os.environ, _ENVIRONMENT):
        multiprocessing.forkserver.ensure_running()
    atexit.register(_kill_all)
    # The first waits for the imports, which no test has to time.
    first = found.Process(target=int)
    first.start()
    first.join()
    return found


def _kill_all() -> None:
    """What a test that failed has left, for whose end the interpreter would wait."""
    for left in multiprocessing.active_children():
        left.kill()


class Started:
    """A call of `function` in a forked process, the first of a session of its own.

    It is asked like a process of `subprocess`. What it and its children print is kept: both streams as one, or `apart`.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        folder: Path = TESTS,
        apart: bool = False,
        **environment: str,
    ) -> None:
        # Removed with this object.
        self._kept = tempfile.TemporaryDirectory(prefix="preloaded-")
        self._logs = [Path(self._kept.name, name) for name in (["out", "err"] if apart else ["out"])]
        whole = os.environ | _ENVIRONMENT | environment
        self._process = context().Process(target=_begin, args=(self._logs, folder, whole, function, *arguments))
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        """-9 after SIGKILL; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def communicate(self, timeout: float = 600) -> tuple[str, str]:
        """Wait for its end; what was printed, and, if kept apart, what were errors. Raises `TimeoutError`."""
        self._process.join(timeout)
        output, *errors = (log.read_text(errors="replace") if log.is_file() else "" for log in self._logs)
        if self.returncode is None:
            os.killpg(self.pid, signal.SIGKILL)
            raise TimeoutError(f"still ran after {timeout:.0f} s:\n{output[-6000:]}")
        return output, "".join(errors)


def megarl(folder: Path, *arguments: str, apart: bool = False, **environment: str) -> Started:
    """`megarl ARGUMENTS` in `folder`."""
    return Started(_megarl, *arguments, folder=folder, apart=apart, **environment)


def _megarl(*arguments: str) -> None:
    from megarl.cli.main import main

    sys.argv = ["megarl", *arguments]
    main()


def _begin(
    logs: list[Path], folder: Path, environment: dict[str, str], function: Callable[..., Any], *arguments: Any
) -> None:
    # The server passes over what it cannot import.
    assert set(IMPORTS) <= sys.modules.keys()
    # What is there now, all processes share: they need not look through it again, which takes seconds.
    gc.freeze()
    # Whoever started the tests may ignore some, as under nohup, which a run respects.
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for stream, log in zip((1, 2), (logs[0], logs[-1]), strict=True):
        opened = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(opened, stream)
        os.close(opened)
    function(*arguments)
