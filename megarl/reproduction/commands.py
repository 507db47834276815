"""The commands that a reproduction gives: how they read, and how they are run."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import megarl
from megarl.errors import Interrupted, MegarlError

#: megarl's repository.
HOME = Path(megarl.__file__).resolve().parents[1]


@dataclass(frozen=True)
class Command:
    """`megarl ...`, a program of tools/, or another one (`program`), with its arguments."""

    program: str
    arguments: tuple[str, ...]

    def __str__(self) -> str:
        """As somebody types it, in the working folder."""
        return shlex.join([*self._shown(), *self.arguments])

    def _shown(self) -> list[str]:
        if not self.program.endswith(".py"):
            return [self.program]
        return ["python", os.path.relpath(HOME / "tools" / self.program)]

    def run(self) -> None:
        """Run it, its output where this process's goes. Raises `Failed` where it does not succeed."""
        if self.program == "megarl":
            words = [sys.executable, "-P", "-m", "megarl"]
        elif self.program.endswith(".py"):
            words = [sys.executable, str(HOME / "tools" / self.program)]
        else:
            words = [self.program]
        paths = [str(HOME), str(HOME / "tools"), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        code = _waited([*words, *self.arguments], environment)
        if code == Interrupted.exit_code:
            raise Failed(f"`{self}` was stopped; give the same command again, which goes on where it was", code)
        if code:
            raise Failed(f"`{self}` ended with code {code}; what went wrong is above", code)


class Failed(MegarlError):
    """A command that ended with an error; the process ends with its code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        # By a signal: as a shell has it.
        self.exit_code = code if code > 0 else 128 - code


def _waited(words: Sequence[str], environment: Mapping[str, str]) -> int:
    """The exit code of a program. Meanwhile what asks this process to stop is the program's affair, which saves."""
    with subprocess.Popen(words, env=environment) as process:
        # A terminal sends these to both.
        handlers: dict[int, Any] = dict.fromkeys((signal.SIGINT, signal.SIGQUIT, signal.SIGHUP), _leave)
        handlers |= {one: lambda number, _: process.send_signal(number) for one in (signal.SIGTERM, signal.SIGUSR1)}
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            return process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _leave(_number: int, _frame: object) -> None:
    """Do nothing; SIG_IGN would be inherited."""


def megarl_command(*arguments: str) -> Command:
    """`megarl ARGUMENTS`."""
    return Command("megarl", arguments)


def tool(line: str) -> Command:
    """A program of tools/ with its arguments, written in one line."""
    program, *arguments = shlex.split(line)
    return Command(program, tuple(arguments))
