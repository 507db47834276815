"""Reward by how hard a problem is: by level or source where the data says one, and by the past in evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from megarl.report.charts import chart, line
from megarl.report.runs import Run, read_lines

SECTION = "Reward by difficulty"
#: Evaluations whose answers are read, evenly spread over a run, the last among them. Our choice.
EVALUATIONS = 12
#: Shares of a problem's answers that were right before, by what they are called: up to and with each bound.
_PAST = ((0.0, "never right before"), (0.5, "right up to half of the time"), (0.999, "right more often"))
_ALWAYS = "always right before"


def charts_of_difficulty(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Charts of reward and accuracy by level, by source, and by what evaluations before have seen."""
    found = [
        _of_table(runs, "reward_mean_by_level", "mean reward by level, a column of the data"),
        _of_table(runs, "reward_mean_by_source", "mean reward by source, a column of the data"),
        _of_table(runs, "accuracy_by_source", "accuracy by source, a column of the data"),
        chart(
            "share of right answers in evaluations, by the problem's past share in those before",
            SECTION,
            [one for number, run in enumerate(runs) for one in _by_past(number, run, len(runs))],
        ),
    ]
    return [one for one in found if one["series"]]


def evaluation_files(directory: Path) -> list[tuple[int, Path]]:
    """The answers of a run's evaluations by their step, of many as many as are read."""
    files = sorted(
        (int(number), file)
        for file in directory.glob("evaluations/step_*.jsonl")
        if (number := file.stem.removeprefix("step_")).isdecimal()
    )
    if len(files) <= EVALUATIONS:
        return files
    return [files[place * (len(files) - 1) // (EVALUATIONS - 1)] for place in range(EVALUATIONS)]


def _of_table(runs: Sequence[Run], name: str, title: str) -> dict[str, Any]:
    """A line for each key of a metric that is a table: of a run's steps, else of its evaluations."""
    series = []
    for number, run in enumerate(runs):
        rows = [row for row in run.steps if isinstance(row.get(name), dict)]
        rows = rows or [row for row in run.evaluations if isinstance(row.get(name), dict)]
        for key in dict.fromkeys(key for row in rows for key in row[name]):
            points = [(row["step"], row[name].get(key)) for row in rows]
            series.append(line(number, f"{run.name} · {key}" if len(runs) > 1 else key, points))
    return chart(title, SECTION, series)


def _by_past(number: int, run: Run, runs: int) -> list[dict[str, Any]]:
    """For each evaluation but the first the share of right answers to problems of one past."""
    past: dict[tuple[Any, Any], list[bool]] = {}
    found: dict[str, list[tuple[int, float]]] = {name: [] for _, name in _PAST} | {_ALWAYS: []}
    for step, file in evaluation_files(run.directory):
        now: dict[tuple[Any, Any], list[bool]] = {}
        for row in read_lines(file).rows:
            if isinstance(row.get("right"), bool) and row.get("by", "policy") == "policy":
                now.setdefault((row.get("source"), row.get("prompt_index")), []).append(row["right"])
        by_past: dict[str, list[float]] = {}
        for problem, answers in now.items():
            if problem in past:
                share = fmean(past[problem])
                name = next((name for bound, name in _PAST if share <= bound), _ALWAYS)
                by_past.setdefault(name, []).append(fmean(answers))
            past.setdefault(problem, []).extend(answers)
        for name, shares in by_past.items():
            found[name].append((step, fmean(shares)))
    return [line(number, f"{run.name} · {name}" if runs > 1 else name, points) for name, points in found.items()]
