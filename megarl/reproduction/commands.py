"""The commands that a reproduction gives: how they read, and how they are run."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import megarl
from megarl.errors import MegarlError

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
        """Run it, its output where this process's goes. Raises `MegarlError` where it fails."""
        if self.program == "megarl":
            words = [sys.executable, "-P", "-m", "megarl"]
        elif self.program.endswith(".py"):
            words = [sys.executable, str(HOME / "tools" / self.program)]
        else:
            words = [self.program]
        paths = [str(HOME), str(HOME / "tools"), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        code = subprocess.run([*words, *self.arguments], env=environment, check=False).returncode
        if code:
            raise Failed(f"`{self}` ended with code {code}; what went wrong is above", code)


class Failed(MegarlError):
    """A command that ended with an error; the process ends with its code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.exit_code = code if 0 < code < 256 else 1


def megarl_command(*arguments: str) -> Command:
    """`megarl ARGUMENTS`."""
    return Command("megarl", arguments)


def tool(line: str) -> Command:
    """A program of tools/ with its arguments, written in one line."""
    program, *arguments = shlex.split(line)
    return Command(program, tuple(arguments))
