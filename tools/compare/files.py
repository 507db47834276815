"""Reading and writing of the comparison's small files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write_rows(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object per line."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The objects of a file of one per line."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def write_json(file: Path, value: Any) -> None:
    """Write `value`, indented; the file is never seen half written."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    partial.replace(file)


def read_json(file: Path) -> Any:
    """The value of a JSON file."""
    return json.loads(file.read_text(encoding="utf-8"))
