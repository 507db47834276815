"""What a run has left in its folder, read as far as it can be: a crash leaves half a line, and a number may be none."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from megarl.errors import Refusal
from megarl.report.figures import one_level


class Lines(NamedTuple):
    """The objects of a file, a line each, and what of it is none: whether its last line is `unfinished`, how many
    others are `unreadable`, and how many numbers are `not_finite`; these are None."""

    rows: list[dict[str, Any]]
    unfinished: bool = False
    unreadable: int = 0
    not_finite: int = 0

    def remarks(self, name: str) -> list[str]:
        """Sentences about what could not be read of the file of that name."""
        found = []
        if self.unfinished:
            found.append(f"{name}: the last line is unfinished, as a crash leaves it, and is left out")
        if self.unreadable:
            found.append(f"{name}: {self.unreadable} line(s) cannot be read and are left out")
        if self.not_finite:
            found.append(f"{name}: {self.not_finite} number(s) are NaN or infinite and are not drawn")
        return found


@dataclass(frozen=True)
class Run:
    """A run, or as much as there is of one: the lines of its steps and of its evaluations, each by their step, those of
    phases.jsonl, its resolved settings by dotted key, the versions it ran with, and remarks about what of it could not
    be read."""

    name: str
    directory: Path
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    phases: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()


def read_runs(directories: Sequence[Path]) -> list[Run]:
    """The runs in these folders, each by a name of its own. Raises `Refusal` as `read_run`."""
    names = [directory.resolve().name for directory in directories]
    if len(set(names)) < len(names):
        names = [str(directory) for directory in directories]
    return [read_run(directory, name) for directory, name in zip(directories, names, strict=True)]


def read_run(directory: Path, name: str) -> Run:
    """What the run in `directory` has left. Raises `Refusal` where it is no run's, or has recorded nothing yet."""
    file = directory / "metrics.jsonl"
    if not file.is_file():
        raise Refusal(
            str(directory),
            f"must be the folder of a run, with metrics.jsonl, which {_why_not(directory)}",
            "give the folder that a run writes, such as runs/quickstart",
        )
    metrics = read_lines(file)
    known = [row for row in metrics.rows if isinstance(row.get("step"), int)]
    metrics = metrics._replace(unreadable=metrics.unreadable + len(metrics.rows) - len(known))
    if not known:
        raise Refusal(
            str(file), "must have the line of a step or an evaluation, and has none", "wait for the run's first step"
        )
    phases = read_lines(directory / "phases.jsonl")
    return Run(
        name,
        directory,
        [row for row in known if "loss" in row],
        [row for row in known if "loss" not in row],
        [row for row in phases.rows if isinstance(row.get("step"), int) and isinstance(row.get("ranks"), dict)],
        _object(directory / "summary.json"),
        _settings(directory / "config.yaml"),
        {str(name): str(one) for name, one in _object(directory / "preflight.json").get("versions", {}).items()},
        (*metrics.remarks("metrics.jsonl"), *phases.remarks("phases.jsonl")),
    )


def read_lines(file: Path) -> Lines:
    """The objects of a .jsonl file; none where it is not there."""
    return objects_of(file.read_bytes().split(b"\n")) if file.is_file() else Lines([])


def objects_of(lines: Sequence[bytes]) -> Lines:
    """The objects of a file's lines, the last of which is what follows the last line's end."""
    rows: list[dict[str, Any]] = []
    not_finite: list[str] = []
    unreadable, unfinished = 0, False
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            # NaN and infinity are no JSON, but Python writes them.
            row = json.loads(line.decode("utf-8", "replace"), parse_constant=not_finite.append)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif number == len(lines):
            unfinished = True
        else:
            unreadable += 1
    return Lines(rows, unfinished, unreadable, len(not_finite))


def _object(file: Path) -> dict[str, Any]:
    found = _json(file)
    return found if isinstance(found, dict) else {}


def _json(file: Path) -> Any:
    """What a file of JSON holds; None where it is not there, or is none."""
    try:
        return json.loads(file.read_text(encoding="utf-8", errors="replace"), parse_constant=lambda _: None)
    except (OSError, ValueError, RecursionError):
        return None


def _settings(file: Path) -> dict[str, Any]:
    try:
        found = yaml.load(file.read_text(encoding="utf-8"), yaml.CSafeLoader)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return {key.replace("/", "."): value for key, value in one_level(found).items()} if isinstance(found, dict) else {}


def _why_not(directory: Path) -> str:
    if not directory.exists():
        return "is not there"
    return "is not in it" if directory.is_dir() else "is a file"
