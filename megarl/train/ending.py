"""What a run says at its end: what was reached, and where everything lies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megarl.report.figures import clock_time, problems

#: What lies in a run's folder, in the order in which somebody may want to see it.
_PLACES = (
    ("summary", "summary.json"),
    ("report", "report.html"),
    ("curves", "curves.png"),
    ("metrics", "metrics.jsonl"),
    ("samples", "samples.jsonl"),
    ("evaluations", "evaluations"),
    ("rollouts", "rollouts"),
    ("settings", "config.yaml"),
)


def first_and_last(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """`reward_first`, `reward_last`, `loss_first`, `loss_last` by the lines of metrics.jsonl: the first and the last
    step's, also where the run was continued; None where there is none."""
    steps = [line for line in lines if "loss" in line]
    found: dict[str, Any] = {}
    for name, metric in (("reward", "reward_mean"), ("loss", "loss")):
        values = [line[metric] for line in steps if line.get(metric) is not None]
        found |= {f"{name}_first": values[0] if values else None, f"{name}_last": values[-1] if values else None}
    return found


def sentences(summary: dict[str, Any], lines: list[dict[str, Any]], directory: Path) -> list[str]:
    """The last lines of a finished run, by its summary.json, metrics.jsonl and folder."""
    steps = summary["steps"]
    said = [f"{summary['name']}: {steps} step(s) done; this start took {clock_time(summary['seconds'])}"]
    said += [f"  {name:<12}{text}" for name, text in _reached(summary, lines)]
    if summary["skipped_updates"]:
        said.append(f"  {'skipped':<12}{summary['skipped_updates']} updates, whose loss or gradient was not finite")
    return said + [f"  {name:<12}{place}" for name, place in _places(directory)]


def _reached(summary: dict[str, Any], lines: list[dict[str, Any]]) -> list[tuple[str, str]]:
    evaluations = [line for line in lines if line.get("accuracy") is not None]
    found: list[tuple[str, str]] = []
    if evaluations:
        first, last = evaluations[0], evaluations[-1]
        found.append(("accuracy", f"{_change(first['accuracy'], last['accuracy'], evaluations)} on {problems(last)}"))
    steps = [line for line in lines if "loss" in line]
    if summary["reward_last"] is not None:
        found.append(("reward", _change(summary["reward_first"], summary["reward_last"], steps)))
    elif summary["loss_last"] is not None:
        found.append(("loss", _change(summary["loss_first"], summary["loss_last"], steps)))
    return found


def _change(first: float, last: float, lines: list[dict[str, Any]]) -> str:
    if len(lines) == 1:
        return f"{last:.4g} (step {lines[0]['step']})"
    return f"{first:.4g} -> {last:.4g} (steps {lines[0]['step']} and {lines[-1]['step']})"


def _places(directory: Path) -> list[tuple[str, str]]:
    found = [(name, str(directory / file)) for name, file in _PLACES if (directory / file).exists()]
    checkpoints = directory / "checkpoints"
    if (latest := checkpoints / "latest").is_file():
        found.append(("checkpoint", str(checkpoints / latest.read_text(encoding="utf-8").strip())))
    if (directory / "hf").is_dir():
        found.append(("model", f"{directory / 'hf'} (Hugging Face)"))
    return found
