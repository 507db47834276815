"""What came out beside what was published: difference, interval and verdict, for a person and as a file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, TextIO

from rich import box
from rich.console import Console
from rich.table import Table

from megarl.config.reproduces import ReproducesSettings
from megarl.reproduction.rows import Row

#: The file of a run's folder that has its verdict.
FILE = "reproduction.json"
Word = Literal["inside", "outside", "not published", "not measured"]


@dataclass(frozen=True)
class Line:
    """One benchmark, or the average: percentages. `interval` of what was measured; None where there is none."""

    name: str
    published: float | None
    measured: float | None
    interval: tuple[float, float] | None
    word: Word

    @property
    def difference(self) -> float | None:
        """Measured less published, in points."""
        return None if self.published is None or self.measured is None else self.measured - self.published


@dataclass(frozen=True)
class Verdict:
    """The lines of a row, the average last where one was published or measured over several benchmarks."""

    row: str
    source: str
    measure: str
    tolerance: float
    lines: tuple[Line, ...]

    @property
    def word(self) -> str:
        """The row's verdict: by the average where there is a published one, else by every benchmark."""
        judged = [line for line in self.lines if line.published is not None]
        if not judged:
            return "not published"
        decisive = [line for line in judged if line.name == AVERAGE] or judged
        if any(line.word == "not measured" for line in decisive):
            return "not measured"
        return "reproduced" if all(line.word == "inside" for line in decisive) else "not reproduced"


AVERAGE = "average"


def judge(about: ReproducesSettings, results: Mapping[str, Mapping[str, Any]]) -> Verdict:
    """The verdict of a row by its suites' results, as their results.json have them.

    A published score is inside where it is at most `tolerance` points outside the interval of the measured one; where
    there is no interval (of pass@k and maj), of the measured score itself.
    """
    benchmarks = {name: one for suite in results.values() for name, one in suite["benchmarks"].items()}
    names = list(dict.fromkeys([*about.scores, *benchmarks]))
    lines = [
        _line(name, about.scores.get(name), *_measured(benchmarks.get(name), about.measure), about.tolerance)
        for name in names
    ]
    if about.average is not None or len(names) > 1:
        lines.append(_average(about, results, lines))
    return Verdict(about.row, about.source, about.measure, about.tolerance, tuple(lines))


def _measured(found: Mapping[str, Any] | None, measure: str) -> tuple[float | None, tuple[float, float] | None]:
    """A benchmark's score in percent, and its interval."""
    if found is None:
        return None, None
    if measure == "avg":
        return _percent(found["score"]), _interval(found["interval"])
    share = found["majority"] if measure == "maj" else found["pass"].get(measure.removeprefix("pass@"))
    return _percent(share), None


def _average(about: ReproducesSettings, results: Mapping[str, Mapping[str, Any]], lines: Sequence[Line]) -> Line:
    """The plain mean over the benchmarks, known where all are; with its interval where one suite has them all."""
    values = [line.measured for line in lines if line.measured is not None]
    measured = fmean(values) if values and len(values) == len(lines) else None
    interval = None
    if about.measure == "avg" and len(results) == 1:
        interval = _interval(next(iter(results.values())).get("average_interval"))
    return _line(AVERAGE, about.average, measured, interval if measured is not None else None, about.tolerance)


def _line(
    name: str,
    published: float | None,
    measured: float | None,
    interval: tuple[float, float] | None,
    tolerance: float,
) -> Line:
    if published is None:
        word: Word = "not published"
    elif measured is None:
        word = "not measured"
    else:
        low, high = interval or (measured, measured)
        # Rounded figures: half of their last digit is nobody's difference.
        word = "inside" if low - tolerance - 0.05 <= published <= high + tolerance + 0.05 else "outside"
    return Line(name, published, measured, interval, word)


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _interval(ends: Sequence[float] | None) -> tuple[float, float] | None:
    return None if ends is None else (100 * ends[0], 100 * ends[1])


def keep(row: Row, verdict: Verdict) -> Path:
    """Write the verdict into the run's folder."""
    path = row.folder / FILE
    lines = [asdict(line) | {"difference": line.difference} for line in verdict.lines]
    table = asdict(verdict) | {"verdict": verdict.word, "lines": lines}
    path.write_text(json.dumps(table, indent=1), encoding="utf-8")
    return path


def print_verdicts(verdicts: Mapping[str, Verdict], stream: TextIO) -> None:
    """One table of all rows: paper, measured, difference, and whether it lies inside."""
    table = Table("row", box=box.SIMPLE_HEAD)
    table.add_column("benchmark", no_wrap=True)
    for name in ("paper", "measured", "95 %", "difference"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for name, verdict in verdicts.items():
        for number, line in enumerate(verdict.lines):
            interval = "-" if line.interval is None else f"{line.interval[0]:.1f} to {line.interval[1]:.1f}"
            difference = "-" if line.difference is None else f"{round(line.difference, 1) + 0.0:+.1f}"
            first = f"{name}: {verdict.row}" if number == 0 else ""
            table.add_row(
                first, line.name, _shown(line.published), _shown(line.measured), interval, difference, line.word
            )
        table.add_row("", "", "", "", "", "", f"[bold]{verdict.word}[/bold]", end_section=True)
    console = Console(file=stream, highlight=False)
    # A file has no width.
    (console if console.is_terminal else Console(file=stream, highlight=False, width=140)).print(table)
    for source in dict.fromkeys(
        f"{one.source}; {one.measure}, tolerance {one.tolerance:g}" for one in verdicts.values()
    ):
        print(f"paper: {source}", file=stream, flush=True)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
