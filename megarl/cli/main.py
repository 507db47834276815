"""The `megarl` command. One file per command; errors meant for the user end as one line on stderr."""

from __future__ import annotations

import locale
import os
import sys
from pathlib import Path

import typer

import megarl
from megarl.cli.bench import bench
from megarl.cli.check import check
from megarl.cli.doctor import doctor
from megarl.cli.evaluate import evaluate
from megarl.cli.generate import generate
from megarl.cli.grade import grade
from megarl.cli.home import require_home
from megarl.cli.plan import plan
from megarl.cli.report import report
from megarl.cli.reproduce import reproduce
from megarl.cli.submit import submit
from megarl.cli.train import train
from megarl.config import user_code
from megarl.errors import MegarlError
from megarl.parallel import terminal

app = typer.Typer(
    help="Reinforcement learning of language models on Megatron-core policies and vLLM engines.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for _command in (train, evaluate, generate, grade, check, plan, submit, reproduce, report, doctor):
    app.command()(_command)
app.add_typer(bench, name="bench")


def main() -> None:
    """Run the command line. A `MegarlError` becomes its sentence on stderr and its exit code, no traceback."""
    _speak_utf8()
    terminal.keep()
    _leave_working_folder()
    try:
        require_home()
        app()
    except MegarlError as error:
        if not error.delivered:
            terminal.say(str(error))
        sys.exit(error.exit_code)


def _speak_utf8() -> None:
    """Begin again in Python's UTF-8 mode where the locale is of another encoding.

    Files of models, data and runs are UTF-8, and neither megarl's libraries nor the processes that it starts say so
    everywhere they read, write and print.
    """
    if sys.flags.utf8_mode or locale.getencoding().lower() == "utf-8" or os.environ.get("PYTHONUTF8") == "1":
        return
    os.environ["PYTHONUTF8"] = "1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _leave_working_folder() -> None:
    """Let neither this process nor those it starts take modules from the working folder (`megarl.config.user_code`)."""
    sys.path[:] = user_code.search_path()
    home = str(Path(megarl.__file__).parents[1])
    if home not in sys.path:
        # A checkout that is not installed, started from within: processes started from here must find it.
        sys.path.append(home)
    os.environ["PYTHONSAFEPATH"] = "1"
