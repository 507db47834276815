"""What the conversion tools share: the processes, a progress bar, errors as one sentence, the speed at the end."""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from megarl.conversion.ranks import Ranks, find_ranks
from megarl.errors import MegarlError

#: Told the bytes done and those to do.
Told = Callable[[int, int], None]


def run(action: Callable[[Ranks], int]) -> int:
    """Run a tool's work on all processes; returns the exit code. An error of one of them ends all."""
    try:
        ranks = find_ranks()
    except MegarlError as error:
        return _say(error)
    try:
        return action(ranks)
    except MegarlError as error:
        code = _say(error)
        ranks.abort(code)
        return code
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        ranks.abort(130)
        return 130
    except BaseException:
        # Other processes would wait for this one for ever.
        if ranks.size > 1:
            traceback.print_exc()
        ranks.abort(1)
        raise


def _say(error: MegarlError) -> int:
    print(f"megarl: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
    return error.exit_code


def convert(ranks: Ranks, label: str, out: Path, work: Callable[[Told], int]) -> int:
    """Do a conversion behind a progress bar, and say at the end how much was written and how fast."""
    start = time.monotonic()
    with bar(label, shown=ranks.is_first) as told:
        size = work(told)
    seconds = time.monotonic() - start
    if ranks.is_first:
        speed = f"{size / 1e9 / max(seconds, 1e-9):.2f} GB/s"
        print(f"{out}: {size / 1e9:.3f} GB of weights in {seconds:.1f} s, {speed}, {ranks.size} processes")
    return 0


@contextmanager
def bar(label: str, *, shown: bool = True) -> Iterator[Told]:
    """A progress bar on a terminal. Of several processes one shows it: their parts are about as large."""
    columns = (TextColumn(label), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as progress:
        task = progress.add_task(label, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def positive(text: str) -> int:
    """A number of processes, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from 1 on")
    return int(text)


def directory(text: str) -> Path:
    """An existing directory, for argparse."""
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is no directory")
    return Path(text)


def gigabytes(text: str) -> int:
    """A size in GB as bytes, for argparse."""
    try:
        size = float(text)
    except ValueError:
        size = 0.0
    if not size > 0:
        raise argparse.ArgumentTypeError(f"{text!r} must be a size in GB above 0")
    return int(size * 1e9)
