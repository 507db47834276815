"""All rows at a glance: size, GPUs, GPU-hours and state.

The hours are those of `megarl.rehearsal.hours`, the cheap part of a plan: nothing is built, so the list takes seconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TextIO

from rich import box
from rich.console import Console
from rich.table import Table

from megarl.config import files
from megarl.config.cluster import Cluster
from megarl.config.model_shape import read_model_shape
from megarl.errors import Refusal
from megarl.formats import checkpoint_folder
from megarl.rehearsal.hours import hours_of, parameters
from megarl.reproduction import verdict
from megarl.reproduction.inputs import absent_start, missing
from megarl.reproduction.rows import Row
from megarl.reproduction.stages import is_trained


@dataclass(frozen=True)
class Facts:
    """What is known of a row without a run: None where its model's sizes are not."""

    parameters: int | None
    gpus: int | None
    gpu_hours: float | None


def facts_of(row: Row, cluster: Cluster) -> Facts:
    """Its model's parameters, its GPUs, and the estimate of their hours on `cluster`."""
    config = files.with_known_model(row.config)
    try:
        shape = read_model_shape(config.model.path)
    except Refusal:
        return Facts(None, row.config.gpus, None)
    hours = None if config.gpus is None else hours_of(config, shape, cluster, config.gpus).gpu_hours
    return Facts(parameters(shape), config.gpus, hours)


def state_of(row: Row) -> str:
    """How far a row is, in a few words, by what is there."""
    try:
        return _state(row)
    except Refusal as refusal:
        return f"refused: {refusal.value}"


def _state(row: Row) -> str:
    file = row.folder / verdict.FILE
    if is_trained(row):
        if file.is_file():
            return json.loads(file.read_text(encoding="utf-8"))["verdict"]
        return "trained"
    checkpoint = checkpoint_folder.find(row.folder / "checkpoints") if row.folder.is_dir() else None
    if checkpoint is not None:
        return f"step {checkpoint_folder.read_progress(checkpoint)['step']} of {row.config.steps}"
    lacking = missing(row)
    if lacking:
        return f"lacks {lacking[0].path}" + (f" and {len(lacking) - 1} more" if len(lacking) > 1 else "")
    return f"waits for {row.start}" if absent_start(row) else "ready"


def print_rows(rows: Sequence[Row], cluster: Cluster, stream: TextIO) -> None:
    """A line for every row, table by table."""
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("name", "row"):
        table.add_column(name, no_wrap=True)
    for name in ("size", "GPUs", "GPU-hours *"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for row, is_last in _with_ends(rows):
        facts = facts_of(row, cluster)
        size = "-" if facts.parameters is None else shown_size(facts.parameters)
        hours = "-" if facts.gpu_hours is None else f"{facts.gpu_hours:,.0f}"
        gpus = "-" if facts.gpus is None else str(facts.gpus)
        table.add_row(row.name, row.about.row, size, gpus, hours, state_of(row), end_section=is_last)
    console = Console(file=stream, highlight=False)
    (console if console.is_terminal else Console(file=stream, highlight=False, width=160)).print(table)
    print("* estimated, as `megarl plan` does it: docs/plan.md#time", file=stream)


def shown_size(parameters: int) -> str:
    """A number of parameters as people say it.

    >>> shown_size(7_615_616_512), shown_size(820_000)
    ('7.6B', '0.8M')
    """
    return f"{parameters / 1e9:.1f}B" if parameters >= 1e8 else f"{parameters / 1e6:.1f}M"


def _with_ends(rows: Sequence[Row]) -> Iterator[tuple[Row, bool]]:
    for number, row in enumerate(rows):
        yield row, number + 1 == len(rows) or rows[number + 1].about.table != row.about.table
