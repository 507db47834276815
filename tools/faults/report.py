"""What a campaign found: a table per kind, on the terminal and in report.md, and a picture."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from faults import verdict
from faults.plan import KINDS

COLUMNS = ("kind", "what happens", "faults", "recovered", "refused", "failed", "seconds to end", "worst / limit")

_COLOURS = {verdict.RECOVERED: "#2f7d4f", verdict.REFUSED: "#2f6fb0"}
_FAILED = "#c0392b"


def read(out: Path) -> list[dict[str, Any]]:
    """The faults that are done, the last result of each; a line that was cut off is left out."""
    file = out / "results.jsonl"
    found: dict[str, dict[str, Any]] = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            one = json.loads(line)
        except ValueError:
            continue
        found[one["name"]] = one
    return sorted(found.values(), key=lambda one: one["number"])


def rows(results: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The table, with a last row for all kinds."""
    made = [_row(name, kind.does, [r for r in results if r["kind"] == name]) for name, kind in KINDS.items()]
    return [row for row in made if row[2] != "0"] + [_row("all", "", results)]


def _row(name: str, does: str, results: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    outcomes = [one["outcome"] for one in results]
    seconds = [one["seconds"] for one in results]
    recovered, refused = outcomes.count(verdict.RECOVERED), outcomes.count(verdict.REFUSED)
    worst = max(results, key=lambda one: one["seconds"] / max(one["limit"], 0.1), default=None)
    return (
        name,
        does,
        str(len(results)),
        str(recovered),
        str(refused),
        str(len(results) - recovered - refused),
        f"{statistics.median(seconds):.1f} (most {max(seconds):.1f})" if seconds else "",
        f"{worst['seconds']:.1f} / {worst['limit']:.0f}" if worst and name != "all" else "",
    )


def write(out: Path, results: Sequence[dict[str, Any]], skipped: Sequence[str], seed: int) -> None:
    """report.md."""
    lines = ["# Fault campaign", "", f"{len(results)} faults, seed {seed}.", ""]
    lines += ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(row) + " |" for row in rows(results)]
    lines += ["", *(f"- {line}" for line in skipped)]
    failures = [one for one in results if one["outcome"] not in verdict.GOOD]
    if failures:
        lines += ["", "## Failures", ""]
        lines += [f"- {one['name']}: {one['outcome']}: {one['why']}" for one in failures]
    (out / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def draw(out: Path, results: Sequence[dict[str, Any]]) -> None:
    """campaign.png: seconds to the end of the job, fault by fault."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = [name for name in KINDS if any(one["kind"] == name for one in results)]
    figure, axes = pyplot.subplots(figsize=(9, 0.42 * len(kinds) + 1.6), layout="constrained")
    for outcome in dict.fromkeys(one["outcome"] for one in results):
        of_it = [one for one in results if one["outcome"] == outcome]
        axes.scatter(
            [max(one["seconds"], 0.01) for one in of_it],
            [kinds.index(one["kind"]) + _apart(one, results) for one in of_it],
            s=22,
            color=_COLOURS.get(outcome, _FAILED),
            marker="o" if outcome in _COLOURS else "X",
            label=f"{outcome} ({len(of_it)})",
            alpha=0.8,
        )
    for row, kind in enumerate(kinds):
        for limit in {one["limit"] for one in results if one["kind"] == kind}:
            axes.plot([limit, limit], [row - 0.35, row + 0.35], color="#777777", linewidth=1.2)
    axes.set_xscale("log")
    axes.set_yticks(range(len(kinds)), kinds)
    axes.invert_yaxis()
    axes.set_xlabel("seconds from the fault to the end of the job (grey: the limit)")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(out / "campaign.png", dpi=150)
    pyplot.close(figure)


def _apart(one: dict[str, Any], results: Sequence[dict[str, Any]]) -> float:
    """Where in its kind's row a fault is drawn, so that equal ones can be told apart."""
    of_kind = [other["number"] for other in results if other["kind"] == one["kind"]]
    return 0.5 * (of_kind.index(one["number"]) + 0.5) / len(of_kind) - 0.25
