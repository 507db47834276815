"""Draws a run's learning curves from its metrics.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

#: Panels of the picture: metric name and what it is called on the axis.
_PANELS = (
    ("reward_mean", "mean reward"),
    ("accuracy", "held-out accuracy"),
    ("loss", "loss"),
    ("grad_norm", "gradient norm"),
    ("response_length_mean", "response length (tokens)"),
    ("entropy", "entropy (nats)"),
    ("logprob_gap_mean", "|policy - engine| log-prob"),
)


def draw_curves(metrics: Path, picture: Path, title: str) -> None:
    """Write `picture` (PNG) with one panel per metric that has values, and the seconds per phase."""
    if not metrics.is_file():
        return
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    panels = [(name, label) for name, label in _PANELS if any(_number(line.get(name)) for line in lines)]
    if not panels:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = 4
    rows = -(-(len(panels) + 1) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(3.6 * columns, 2.8 * rows), squeeze=False, layout="constrained"
    )
    flat = axes.ravel()
    for axis, (name, label) in zip(flat, panels, strict=False):
        points = [(line["step"], line[name]) for line in lines if _number(line.get(name))]
        axis.plot(*zip(*points, strict=True), marker="o" if len(points) < 12 else None, markersize=3, linewidth=1.4)
        axis.set_title(label, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.grid(alpha=0.3)
    _draw_seconds(flat[len(panels)], lines)
    for axis in flat[len(panels) + 1 :]:
        axis.set_visible(False)
    figure.suptitle(title)
    partial = picture.with_name(picture.stem + ".partial.png")
    figure.savefig(partial, dpi=110)
    pyplot.close(figure)
    partial.replace(picture)


def _draw_seconds(axis: Any, lines: list[dict[str, Any]]) -> None:
    steps = [line for line in lines if isinstance(line.get("seconds"), dict) and "loss" in line]
    names = list(dict.fromkeys(name for line in steps for name in line["seconds"]))
    heights = [[line["seconds"].get(name, 0.0) for line in steps] for name in names]
    if steps:
        axis.stackplot([line["step"] for line in steps], heights, labels=names, alpha=0.8)
        axis.legend(fontsize=6, loc="upper right")
    axis.set_title("seconds per phase", fontsize=10)
    axis.set_xlabel("step", fontsize=8)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
