"""Where each rank's time, memory and pushed weights went in a step, as numbers that the page draws."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megarl.report.runs import Run

#: Steps of a run of which the page has every rank. Our choice: the page stays small.
STEPS = 60

MIB, GIB = 1 << 20, 1 << 30


def times_of(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Of each run its `moments`: steps and evaluations, the slowest among them; see `_moment`."""
    return [{"run": number, "moments": [_moment(one) for one in _chosen(run)]} for number, run in enumerate(runs)]


def _chosen(run: Run) -> list[dict[str, Any]]:
    lines = run.phases
    if len(lines) <= STEPS:
        return lines
    even = {place * (len(lines) - 1) // (STEPS - 1) for place in range(STEPS)}
    slowest = max(range(len(lines)), key=lambda place: sum((lines[place].get("slowest") or {"": 0}).values()))
    return [lines[place] for place in sorted(even | {slowest})]


def _moment(line: dict[str, Any]) -> dict[str, Any]:
    """A line of phases.jsonl: `bars` are its ranks' phases as rank, name, begin and end in seconds; `memory` as rank,
    end of which phase, and GiB; `push` as rank, MiB received, MiB sent, and seconds."""
    ranks = {number: one for number, one in line["ranks"].items() if isinstance(one, dict)}
    begins = [start for one in ranks.values() for _, start, _ in one.get("phases", ())]
    first = min(begins, default=0.0)
    bars = [
        [number, name, round(start - first, 4), round(start - first + seconds, 4)]
        for number, one in ranks.items()
        for name, start, seconds in one.get("phases", ())
    ]
    memory = [
        [number, moment, round(held / GIB, 4)]
        for number, one in ranks.items()
        for moment, held in one.get("memory", {}).items()
    ]
    push = [
        [number, round(one["push"]["received"] / MIB, 3), round(one["push"]["sent"] / MIB, 3), one["push"]["seconds"]]
        for number, one in ranks.items()
        if "push" in one
    ]
    world = line.get("world", len(ranks))
    label = f"step {line['step']}" if line.get("kind") != "evaluation" else f"evaluation after step {line['step']}"
    shown = "" if world == len(ranks) else f" ({len(ranks)} of {world} ranks, the slowest and fastest among them)"
    return {"label": label + shown, "ranks": list(ranks), "bars": bars, "memory": memory, "push": push}
