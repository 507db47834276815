"""A terminal that is gone costs what would have been printed on it, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

#: Prints by all the ways that there are, then leaves a file behind.
PRINTS = """
import logging, sys, warnings
early = logging.StreamHandler()
from megarl.parallel import terminal
terminal.keep()
logging.getLogger().addHandler(early)
logging.getLogger().addHandler(logging.StreamHandler())
kept = open("kept", "w")
from rich.console import Console
from rich.progress import track
for number in range(300):
    print("printed", number, "\\u00e9" * 80)
    print("printed", file=sys.stderr)
    logging.error("logged")
    warnings.warn(f"warned {number}")
    terminal.say("said")
    Console(stderr=True).print("[bold]shown")
for _ in track(range(3)):
    pass
kept.write("whole")
kept.close()
print("left to the flush at the end")
"""

GONE = {
    "a reader that leaves": "2>&1 | head -n 1",
    "a full disk": ">/dev/full 2>&1",
    "closed": ">&- 2>&-",
    "all closed": "<&- >&- 2>&-",
}


def shell(folder: Path, command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    (folder / "prints.py").write_text(PRINTS, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(["bash", "-c", command], cwd=folder, env=environment, capture_output=True, encoding="utf-8")


@pytest.mark.parametrize("how", GONE)
def test_what_is_printed_is_lost_and_nothing_else(tmp_path: Path, how: str):
    shell(tmp_path, f"({sys.executable} prints.py; echo $? >code) {GONE[how]}")
    assert (tmp_path / "code").read_text(encoding="utf-8") == "0\n"
    # Neither has a file that was opened later been given what was meant for the terminal.
    assert (tmp_path / "kept").read_text(encoding="utf-8") == "whole"


def test_what_is_printed_arrives_where_there_is_somebody(tmp_path: Path):
    """In order, whatever the locale: what its encoding lacks goes to a file as UTF-8."""
    done = shell(tmp_path, f"{sys.executable} prints.py", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "printed 0 " + "é" * 80 and lines[-1] == "left to the flush at the end"
    for word in ("printed", "logged", "megarl: said", "shown"):
        assert sum(line == word for line in done.stderr.splitlines()) == (600 if word == "logged" else 300)


def test_a_pipe_that_does_not_wait_loses_nothing(tmp_path: Path):
    """Whoever shares a pipe may have set it so; its reader comes late."""
    unwaiting = "import fcntl, os; fcntl.fcntl(1, fcntl.F_SETFL, os.O_NONBLOCK)"
    prints = "from megarl.parallel import terminal; terminal.keep(); print('x' * 1000000)"
    done = shell(tmp_path, f'{sys.executable} -c "{unwaiting}; {prints}" | (sleep 0.5; wc -c)')
    assert done.stdout.strip() == "1000001", done.stderr


@pytest.mark.parametrize(("place", "code"), [("| true", 0), (">/dev/full", 2)])
def test_a_result_that_cannot_be_written_is_named(tmp_path: Path, place: str, code: int):
    command = "lambda: start.show({'a': 1}, main.sys.stdout, True)"
    prints = f"from megarl.cli import start, main; main.app = {command}; main.main()"
    done = shell(tmp_path, f'({sys.executable} -c "{prints}"; echo $? >code) {place}')
    assert int((tmp_path / "code").read_text(encoding="utf-8")) == code
    said = (
        "megarl: stdout: must take the command's result (No space left on device). Fix: send it to a place with room.\n"
    )
    assert done.stderr == ("" if code == 0 else said)
