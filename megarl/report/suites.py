"""Scores on benchmarks, as `megarl evaluate --suite` leaves them in a run's folder."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from megarl.report.runs import Run


class Table(NamedTuple):
    """A table for the page: what it is of, its columns' names, and its rows, all in text."""

    title: str
    columns: list[str]
    rows: list[list[str]]


def tables_of(run: Run) -> list[Table]:
    """A table for each model whose scores the run's folder has."""
    found = []
    for file in sorted(run.directory.glob("suites/*/results.json")):
        try:
            results = json.loads(file.read_text(encoding="utf-8"))
            rows = [_row(name, one) for name, one in results["benchmarks"].items()]
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            continue
        columns = ["benchmark", "problems", "samples", "avg@k", "interval", "pass@k", "maj@k", "mean length", "cut"]
        found.append(Table(f"{run.name} · {file.parent.name} · suite {results.get('suite')}", columns, rows))
    return found


def _row(name: str, one: dict[str, Any]) -> list[str]:
    low, high = one.get("interval") or (None, None)
    passes = ", ".join(f"@{k} {_percent(share)}" for k, share in (one.get("pass") or {}).items())
    return [
        name,
        str(one.get("problems", "–")),
        str(one.get("samples", "–")),
        _percent(one.get("score")),
        f"{_percent(low)} to {_percent(high)}" if low is not None else "–",
        passes or "–",
        _percent(one.get("majority")),
        f"{one['length_mean']:.0f}" if one.get("length_mean") is not None else "–",
        _percent(one.get("truncated_share")),
    ]


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"
