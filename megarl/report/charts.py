"""The curves of runs, as numbers that the page draws: one chart for each metric, one line for each run.

A chart is an object of JSON: `title`, `section`, `kind` ("lines" or "bars"), `note`, `said` in words for those who do
not see it, and `series`, each with its `run`'s number, its `name`, `x` and `y`; of bars also `low`, where each begins.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from megarl.report.curves import held_out
from megarl.report.figures import flat, rate
from megarl.report.panels import PANELS, TIME
from megarl.report.runs import Run

#: Points of a line; of a longer run every so many are drawn, which its chart says. Our choice.
POINTS = 1500
#: The section of the numbers that no panel has.
OTHERS = "Other numbers"
#: Names, and beginnings of names, of numbers that are drawn otherwise or are no curve.
_NOT_OTHERS = ("step", "epoch", "seconds/", "memory_bytes/", "evaluation_problems", "evaluation_samples")

GIB = 1 << 30


def charts_of(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """All charts of the runs but those of difficulty and of single ranks, in the page's order."""
    tables = [[flat(line | {"tokens_per_second": rate(line)}) for line in _lines(run)] for run in runs]
    known = {panel.metric for panel in PANELS}
    found = []
    for panel in PANELS:
        title = panel.title
        if panel.metric == "accuracy":
            titles = {held_out(_lines(run), title) for run in runs}
            title = titles.pop() if len(titles) == 1 else title
        found.append(chart(title, panel.section, _of_metric(panel.metric, tables, runs)))
    found += _seconds(runs) + _memory(runs, tables) + _pushes(runs)
    rest = {name for table in tables for line in table for name in line if not name.startswith(_NOT_OTHERS)} - known
    # Tables by source and by level are charts of difficulty.
    for name in sorted(name for name in rest if "_by_" not in name.partition("/")[0]):
        found.append(chart(name, OTHERS, _of_metric(name, tables, runs)))
    return [one for one in found if one["series"]]


def chart(title: str, section: str, series: Iterable[dict[str, Any]], kind: str = "lines") -> dict[str, Any]:
    """A chart of the series that have a number."""
    kept = [one for one in series if any(value is not None for value in one["y"])]
    every = max((one.pop("every") for one in kept), default=1)
    note = f"every {every} steps" if every > 1 else ""
    said = "; ".join(_said(one) for one in kept[:6])
    return {"title": title, "section": section, "kind": kind, "note": note, "said": said, "series": kept}


def line(run: int, name: str, points: Sequence[tuple[int, Any]]) -> dict[str, Any]:
    """A series of points (step, value), as many as are drawn."""
    every = max(1, math.ceil(len(points) / POINTS))
    drawn = [*points[:-1:every], *points[-1:]]
    return {
        "run": run,
        "name": name,
        "x": [step for step, _ in drawn],
        "y": [short(value) for _, value in drawn],
        "every": every,
    }


def short(value: Any) -> float | int | None:
    """A number as it is drawn; None where it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.6g}")


def _lines(run: Run) -> list[dict[str, Any]]:
    return [*run.steps, *run.evaluations]


def _of_metric(name: str, tables: Sequence[list[dict[str, Any]]], runs: Sequence[Run]) -> list[dict[str, Any]]:
    found = []
    for number, (run, table) in enumerate(zip(runs, tables, strict=True)):
        kind = _kind(name, table, len(run.steps))
        # Of lines that could have it: a gap is where one has none.
        points = sorted(((one["step"], one.get(name)) for one in kind), key=lambda point: point[0])
        found.append(line(number, run.name, points))
    return found


def _kind(name: str, table: list[dict[str, Any]], steps: int) -> list[dict[str, Any]]:
    """Those lines of a run's steps, or of its evaluations, of which some has the number."""
    return next((part for part in (table[:steps], table[steps:]) if any(name in one for one in part)), [])


def _seconds(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Of each run the seconds of a step's phases, one upon the other."""
    found = []
    for number, run in enumerate(runs):
        steps = [one for one in run.steps if isinstance(one.get("seconds"), dict)]
        every = max(1, math.ceil(len(steps) / 300))
        drawn = steps[::every]
        names = dict.fromkeys(name for one in drawn for name in one["seconds"])
        below = [0.0] * len(drawn)
        series = []
        for name in names:
            one = line(number, name, [(step["step"], step["seconds"].get(name) or 0.0) for step in drawn])
            low, below = below, [base + height for base, height in zip(below, one["y"], strict=True)]
            series.append(one | {"low": [short(v) for v in low], "y": [short(v) for v in below], "every": every})
        title = "seconds per phase" + (f" · {run.name}" if len(runs) > 1 else "")
        found.append(chart(title, TIME, series, "bars") | {"width": every})
    return found


def _memory(runs: Sequence[Run], tables: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Memory at the end of each phase, of the rank that holds most."""
    series = []
    for number, (run, table) in enumerate(zip(runs, tables, strict=True)):
        steps = table[: len(run.steps)]
        for name in dict.fromkeys(name for one in steps for name in one if name.startswith("memory_bytes/")):
            moment = name.partition("/")[2]
            points = [(one["step"], one[name] / GIB) for one in steps if name in one]
            series.append(line(number, f"{run.name} · {moment}" if len(runs) > 1 else moment, points))
    return [chart("memory at the end of a phase, largest rank (GiB)", TIME, series)]


def _pushes(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """How long the weight pushes of a step took the slowest rank, without the memory that changes hands around them."""
    series = []
    for number, run in enumerate(runs):
        points = [(one["step"], one.get("push_seconds")) for one in run.phases if one.get("kind") == "step"]
        series.append(line(number, run.name, points))
    return [chart("weight pushes of a step, slowest rank (s)", TIME, series)]


def _said(series: dict[str, Any]) -> str:
    values = [value for value in series["y"] if value is not None]
    named = {"first": values[0], "last": values[-1], "least": min(values), "most": max(values)}
    return f"{series['name']}: " + ", ".join(f"{value:.4g} {name}" for name, value in named.items())
