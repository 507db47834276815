"""From graded answers to the scores of a benchmark and a suite, and the table that people read. Torch-free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

from rich.console import Console
from rich.table import Table

from megarl.config.suites import Asked
from megarl.evaluation.answers import Row
from megarl.evaluation.estimators import interval, interval_of_average, majority, pass_at

#: A problem's distinct answers: how many samples give each, and whether it is right.
Votes = Sequence[tuple[int, bool]]


def scores(
    asked: Asked, rows: Sequence[Row], skipped: int, votes: Sequence[Votes] | None, counters: Mapping[str, int]
) -> dict[str, Any]:
    """The scores of a benchmark by its answers, one row each; shares are from 0 to 1.

    `problems` that have a scored answer among those asked; `samples` of each; `score`, the mean over problems of their
    answers' mean reward as a share of its range (avg@k where answers are right or wrong); `interval`, 95 % over
    problems; `pass`, unbiased, by k, of problems with at least that many scored samples; `majority` (maj@k, None where
    answers are not compared); `length_*` in tokens; `truncated_share`; `unscored` answers; `skipped` rows of the data;
    `counters` of what went wrong.
    """
    settings = asked.config.evaluation.reward or asked.config.reward
    low, high = settings.bounds
    rewards: dict[int, list[float]] = {}
    right: dict[int, list[bool]] = {}
    for row in rows:
        if row["reward"] is not None:
            rewards.setdefault(row["prompt_index"], []).append((row["reward"] - low) / (high - low))
            right.setdefault(row["prompt_index"], []).append(row["right"])
    means = [fmean(values) for values in rewards.values()]
    ends = interval(means, max(map(len, rewards.values()), default=1))
    passes: dict[str, float] = {}
    for k in asked.pass_at if settings.kind != "judge" else ():
        found = [pass_at(len(one), sum(one), k) for one in right.values() if len(one) >= k]
        if found:
            passes[str(k)] = fmean(found)
    return {
        "problems": len(means),
        "samples": asked.config.evaluation.samples,
        "score": fmean(means) if means else None,
        "interval": None if ends is None else list(ends),
        "pass": passes,
        "majority": fmean(majority(one) for one in votes) if votes else None,
        **_lengths(rows),
        "unscored": sum(row["reward"] is None for row in rows),
        "skipped": skipped,
        "counters": dict(Counter(counters)),
    }


def _lengths(rows: Sequence[Row]) -> dict[str, Any]:
    lengths = [row["length"] for row in rows]
    apart = {name: [row["length"] for row in rows if row["right"] is right] for name, right in _APART}
    return {
        "length_mean": fmean(lengths) if lengths else None,
        "length_median": median(lengths) if lengths else None,
        "length_max": max(lengths, default=None),
        **{name: fmean(values) if values else None for name, values in apart.items()},
        "truncated_share": fmean(row["finish_reason"] == "length" for row in rows) if rows else None,
    }


_APART = (("length_mean_right", True), ("length_mean_wrong", False))


def of_suite(benchmarks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What results.json says: the benchmarks' scores, their plain mean and its interval."""
    scored = [one for one in benchmarks.values() if one["score"] is not None]
    ends = interval_of_average([(one["score"], tuple(one["interval"])) for one in scored])
    return {
        "benchmarks": dict(benchmarks),
        "average": fmean(one["score"] for one in scored) if scored else None,
        "average_interval": None if ends is None else list(ends),
    }


def print_scores(console: Console, results: Mapping[str, Any]) -> None:
    """The table of one suite's results, in percent."""
    table = Table(title=f"{results['suite']}: {results['model']}", title_justify="left")
    table.add_column("benchmark", no_wrap=True)
    for name in ("problems", "k", "avg@k", "95 %", "pass@k", "maj@k", "tokens", "cut", "unscored"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, one in results["benchmarks"].items():
        most = max(one["pass"], key=int, default=None)
        table.add_row(
            name,
            str(one["problems"]),
            str(one["samples"]),
            _percent(one["score"]),
            _range(one["interval"]),
            "-" if most is None else f"{_percent(one['pass'][most])} @{most}",
            _percent(one["majority"]),
            "-" if one["length_mean"] is None else f"{one['length_mean']:.0f}",
            _percent(one["truncated_share"]),
            str(one["unscored"]),
        )
    table.add_section()
    table.add_row("average", "", "", _percent(results["average"]), _range(results["average_interval"]))
    console.print(table)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _range(ends: Sequence[float] | None) -> str:
    return "-" if ends is None else f"{100 * ends[0]:.1f} to {100 * ends[1]:.1f}"
