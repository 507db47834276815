"""Draws a run's learning curves from its metrics.jsonl."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megarl.report.figures import rate
from megarl.report.panels import PANELS

_COLUMNS = 4


def draw_curves(lines: list[dict[str, Any]], picture: Path, title: str) -> None:
    """Write `picture` (PNG): a panel per metric that `lines` of metrics.jsonl have numbers of, and the seconds per
    phase."""
    figure = figure_of(lines, title)
    if figure is not None:
        partial = picture.with_name(picture.stem + ".partial.png")
        figure.savefig(partial, dpi=110)
        partial.replace(picture)


def figure_of(lines: list[dict[str, Any]], title: str) -> Any:
    """The picture as matplotlib's figure; None where there is nothing to draw."""
    lines = [line | {"tokens_per_second": rate(line)} for line in lines]
    panels = [one for one in PANELS if one.pictured and any(_number(line.get(one.metric)) for line in lines)]
    if not panels:
        return None
    from matplotlib.figure import Figure

    steps = [line for line in lines if isinstance(line.get("seconds"), dict) and "loss" in line]
    count = len(panels) + bool(steps)
    columns = min(_COLUMNS, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(3.6 * columns, 2.8 * rows), layout="constrained")
    axes = [figure.add_subplot(rows, columns, number + 1) for number in range(count)]
    for axis, panel in zip(axes, panels, strict=False):
        _draw_metric(axis, panel.metric, lines)
        _label(axis, held_out(lines, panel.title) if panel.metric == "accuracy" else panel.title)
    if steps:
        _draw_seconds(axes[-1], steps)
        _label(axes[-1], "seconds per phase")
    figure.suptitle(title)
    return figure


def _draw_metric(axis: Any, name: str, lines: list[dict[str, Any]]) -> None:
    points = [(line["step"], line[name]) for line in lines if _number(line.get(name))]
    axis.plot(*zip(*points, strict=True), marker="o" if len(points) < 12 else None, markersize=3, linewidth=1.4)
    axis.grid(alpha=0.3)
    # An offset beside the axis would leave a nearly constant curve without its values.
    axis.ticklabel_format(axis="y", useOffset=False, scilimits=(-3, 4))


def _draw_seconds(axis: Any, steps: list[dict[str, Any]]) -> None:
    """One layer per phase over the other; a step is as wide as from one to the next, so that one alone is seen too."""
    edges = [steps[0]["step"] - 0.5, *(line["step"] + 0.5 for line in steps)]
    names = list(dict.fromkeys(name for line in steps for name in line["seconds"]))
    below = [0.0] * len(steps)
    for name in names:
        above = [height + line["seconds"].get(name, 0.0) for height, line in zip(below, steps, strict=True)]
        axis.stairs(above, edges, baseline=below, fill=True, alpha=0.8, label=name)
        below = above
    # Below the panel, which it would cover.
    axis.legend(fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3, frameon=False)


def _label(axis: Any, title: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_title(title, fontsize=10)
    axis.set_xlabel("step", fontsize=8)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def held_out(lines: list[dict[str, Any]], label: str) -> str:
    """The title of the accuracy, which says what it was measured on where that is one thing."""
    evaluations = [line for line in lines if _number(line.get("accuracy"))]
    trained = [line.get("evaluation_problems_in_training_data") for line in evaluations]
    if all(number == 0 for number in trained):
        return f"held-out {label}"
    if trained and None not in trained and trained == [line.get("evaluation_problems") for line in evaluations]:
        return f"{label} on training data"
    return label


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
