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


#: Exit codes beside 0: a comparison that found differences, an error in the input, one of the program's own.
DIFFERENT, REFUSED, FAILED, INTERRUPTED = 1, 2, 3, 130


def run(action: Callable[[Ranks], int]) -> int:
    """Run a tool's work on all processes; returns the exit code. An error of one of them ends all."""
    ranks = Ranks()
    try:
        ranks = find_ranks()
        return action(ranks)
    except MegarlError as error:
        code = error.exit_code
        _say(str(error))
    except OSError as error:
        code = REFUSED
        _say(
            f"{error.filename or 'a file'}: {error.strerror or error}. Fix: see to it, and give the same command again."
        )
    except KeyboardInterrupt:
        code = INTERRUPTED
        _say("stopped")
    except Exception:
        code = FAILED
        traceback.print_exc()
    # The others would wait for this process for ever.
    ranks.abort(code)
    return code


def _say(sentence: str) -> None:
    print(f"megarl: {' '.join(sentence.split())}", file=sys.stderr, flush=True)


def convert(ranks: Ranks, out: Path, work: Callable[[Told], tuple[Path, int]]) -> int:
    """Do a conversion behind a progress bar, and say at the end what was converted and how fast.

    `work` returns its source and the bytes it wrote.
    """
    start = time.monotonic()
    with bar("converting", shown=ranks.is_first) as told:
        source, size = work(told)
    seconds = time.monotonic() - start
    if ranks.is_first:
        speed = f"{size / 1e9 / max(seconds, 1e-9):.2f} GB/s"
        print(f"{source} -> {out}: {size / 1e9:.3f} GB written in {seconds:.1f} s, {speed}, {ranks.size} processes")
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
    if not 0 < size < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} must be a size in GB above 0")
    return int(size * 1e9)
