"""What the comparison leaves behind: claims.json, claims.md, claims.png."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compare.claims import Claim, Figure
from compare.experiments import Experiment, Panel, Runs
from compare.files import read_json, write_json
from compare.runs import TOKENS


def write(out: Path, done: Sequence[tuple[Experiment, Runs, list[Claim]]], seeds: Sequence[int]) -> None:
    """Write all three files into `out`."""
    record: dict[str, Any] = {
        "seeds": list(seeds),
        "claims": [{"experiment": e.name, **claim.record()} for e, _, claims in done for claim in claims],
        "seconds": {
            run.folder.name: read_json(run.folder / "summary.json")["seconds"]
            for _, runs, _ in done
            for arm in runs.values()
            for run in arm
        },
    }
    write_json(out / "claims.json", record)
    (out / "claims.md").write_text(table(done, seeds), encoding="utf-8")
    draw(out / "claims.png", [(e, runs) for e, runs, _ in done])


def table(done: Sequence[tuple[Experiment, Runs, list[Claim]]], seeds: Sequence[int]) -> str:
    """The claims as Markdown: one table per experiment."""
    lines = [
        "# Claims in miniature",
        "",
        f"Seeds: {', '.join(map(str, seeds))}. Figures are the mean over seeds ± their standard deviation, then each "
        "seed. What the set-ups are, and what they do not show: docs/claims.md.",
    ]
    for experiment, _, claims in done:
        lines += ["", f"## {experiment.title}", "", "| claim | rule | figures | holds |", "|---|---|---|---|"]
        for claim in claims:
            figures = "<br>".join(f"{name}: {_figure(value)}" for name, value in claim.figures.items())
            lines.append(f"| {claim.claim} | {claim.rule} | {figures} | {'yes' if claim.holds else '**no**'} |")
    return "\n".join(lines) + "\n"


def _figure(value: Figure) -> str:
    each = ", ".join(f"{number:.3g}" for number in value.per_seed)
    return f"{value.mean:.3g} ± {value.spread:.2g} ({each})"


def draw(file: Path, done: Sequence[tuple[Experiment, Runs]]) -> None:
    """One row of panels per experiment; lines are means over seeds, bands reach from the least to the greatest."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = max(len(experiment.panels) for experiment, _ in done)
    picture, axes = plt.subplots(len(done), columns, figsize=(5.2 * columns, 3.8 * len(done)), squeeze=False)
    for row, (experiment, runs) in zip(axes, done, strict=True):
        for axis, panel in zip(row, experiment.panels, strict=False):
            _draw_panel(axis, experiment, panel, runs)
        for axis in row[len(experiment.panels) :]:
            axis.set_visible(False)
    picture.tight_layout()
    picture.savefig(file, dpi=110)
    plt.close(picture)


def _draw_panel(axis: Any, experiment: Experiment, panel: Panel, runs: Runs) -> None:
    labels = {arm.name: arm.label for arm in experiment.arms}
    for arm in panel.arms:
        for metric, label in panel.metrics.items():
            name = label if len(panel.arms) == 1 else labels[arm]
            if panel.over == "step":
                _band(axis, [run.curve(metric) for run in runs[arm]], name)
            elif panel.over == TOKENS:
                _trace(axis, [run.by_tokens(metric) for run in runs[arm]], name)
            else:
                _trace(axis, [run.paired(metric, panel.over) for run in runs[arm]], name)
    axis.set_title(f"{experiment.title}\n{panel.title}", fontsize=9)
    axis.set_xlabel(panel.over)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def _band(axis: Any, curves: Sequence[Sequence[tuple[int, float]]], label: str) -> None:
    by_step: dict[int, list[float]] = {}
    for step, value in (point for curve in curves for point in curve):
        by_step.setdefault(step, []).append(value)
    steps = sorted(by_step)
    (line,) = axis.plot(steps, [sum(by_step[s]) / len(by_step[s]) for s in steps], label=label)
    least, greatest = ([pick(by_step[s]) for s in steps] for pick in (min, max))
    axis.fill_between(steps, least, greatest, color=line.get_color(), alpha=0.2, linewidth=0)


def _trace(axis: Any, curves: Sequence[Sequence[tuple[float, float]]], label: str) -> None:
    """One line per seed."""
    color = None
    for points in curves:
        (line,) = axis.plot(*zip(*points, strict=True), marker="o", markersize=3, color=color, label=label)
        color, label = line.get_color(), "_nolegend_"
