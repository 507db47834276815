"""What a row reads that must be there before it starts: its model, its data, the run that it begins with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megarl.config import files
from megarl.formats import checkpoint_folder
from megarl.reproduction.commands import Command, tool
from megarl.reproduction.rows import Row, row_names


@dataclass(frozen=True)
class Missing:
    """A file or folder that is not there, what is wrong with it in words, and what brings it.

    `fetches`: it comes over the network, which is not done unasked.
    """

    path: str
    rule: str
    command: Command
    fetches: bool


def missing(row: Row) -> list[Missing]:
    """What of its model and data is not there, each with the command that brings it."""
    return [*_model(row), *_files(row)]


def _model(row: Row) -> Iterator[Missing]:
    if row.about.model is None:
        return
    folder = Path(row.config.model.path)
    if not (folder / "config.json").is_file():
        rule = "is not there"
    else:
        found = next(files.checkpoint_refusals(folder), None)
        if found is None:
            return
        rule = "is not whole"
    command = Command("hf", ("download", row.about.model, "--local-dir", str(folder)))
    yield Missing(str(folder), rule, command, True)


def _files(row: Row) -> Iterator[Missing]:
    for one in row.about.files:
        if not Path(one.path).is_file():
            yield Missing(one.path, "is not there", tool(one.make), one.hub is not None)


def absent_start(row: Row) -> str | None:
    """Why the run that it begins with cannot be begun with yet, in words; None where it can."""
    if row.start is None:
        return None
    folder = Path(str(row.config.model.weights))
    if checkpoint_folder.find(folder) is None:
        return f"{folder} has no checkpoint"
    if not (folder.parent / "summary.json").is_file():
        return f"{folder.parent} has not ended"
    return None


def how_to_start(row: Row) -> str:
    """The command that makes the run that it begins with."""
    return f"megarl reproduce {row.start}" if row.start in row_names() else f"megarl train, a run of name={row.start}"
