"""The rows that can be reproduced: files of configs/reproduce/, and their tables."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megarl.config.load import load_config
from megarl.config.reproduces import ReproducesSettings
from megarl.config.schema import RunConfig
from megarl.errors import Refusal

#: Where rows have names; in tables/ is what the rows of a table share.
FOLDER = Path(__file__).resolve().parents[2] / "configs" / "reproduce"


@dataclass(frozen=True)
class Row:
    """A run that reproduces a row: its file, and what the file says."""

    path: Path
    config: RunConfig
    about: ReproducesSettings

    @property
    def name(self) -> str:
        """The run's name."""
        return self.config.name

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.config.runs_dir) / self.config.name

    @property
    def start(self) -> str | None:
        """The name of the run from whose end it begins; None: it begins with its model."""
        weights = self.config.model.weights
        if weights is None or Path(weights).name != "checkpoints":
            return None
        return Path(weights).parent.name


def row_names() -> list[str]:
    """All rows, by name."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def read_row(path: Path) -> Row:
    """The row that the file `path` is. Raises `Refusal` where it says of no row, and as `load_config`."""
    config = load_config(path)
    if config.reproduces is None:
        rule = "says not what it reproduces"
        raise Refusal(str(path), rule, "add the section reproduces, as the files of configs/reproduce/ have it")
    # As somebody would type it.
    shown = Path(os.path.relpath(path))
    return Row(path if shown.parts[0] == ".." else shown, config, config.reproduces)


def all_rows() -> list[Row]:
    """Every row of configs/reproduce/, table by table."""
    rows = [read_row(FOLDER / f"{name}.yaml") for name in row_names()]
    return sorted(rows, key=lambda row: (row.about.table, row.name))


def find(name: str) -> list[Row]:
    """The row `name`, all rows of the table `name`, or the row of a YAML file; starts before those that need them.

    Raises `Refusal` for an unknown name.
    """
    if name in row_names():
        return [read_row(FOLDER / f"{name}.yaml")]
    path = Path(os.path.expanduser(name))
    if path.suffix in (".yaml", ".yml"):
        return [read_row(path)]
    rows = all_rows()
    if of_table := [row for row in rows if row.about.table == name]:
        return in_order(of_table)
    known = [*row_names(), *dict.fromkeys(row.about.table for row in rows)]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    fix = f"use {' or '.join(near)}" if near else "use one of those that `megarl reproduce` lists"
    raise Refusal(name, "is no row and no table of configs/reproduce/, and no YAML file", fix)


def in_order(rows: Sequence[Row]) -> list[Row]:
    """`rows` with each behind the one that it begins with, else as they were."""
    left, done = list(rows), []
    while left:
        waiting = {row.name for row in left}
        row = next((one for one in left if one.start not in waiting), left[0])
        left.remove(row)
        done.append(row)
    return done
