"""docs/coming_from.md against the settings: every key exists, takes the value shown, and has the default shown."""

from __future__ import annotations

import json
import re
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megarl.config.algorithms import GrpoSettings, OpdSettings
from megarl.config.load import load_config
from megarl.config.sections import RunSettings

PAGE = Path(__file__).parents[1] / "docs" / "coming_from.md"
COMPARISON = ["verl", "TRL", "OpenRLHF", "megarl", "default", "where they differ"]


def tables() -> list[tuple[list[str], list[list[str]]]]:
    """Header and rows of every table."""
    found = []
    for is_table, lines in groupby(PAGE.read_text().splitlines(), key=lambda line: line.startswith("|")):
        if is_table:
            header, _, *rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]
            assert all(len(row) == len(header) for row in rows), header
            found.append((header, rows))
    return found


def in_backticks(cell: str) -> list[tuple[str, str]]:
    """(key, value) of every `key: value` or `key` (then the value is empty) of a cell."""
    return [(key, value) for key, _, value in (text.partition(": ") for text in re.findall(r"`([^`]+)`", cell))]


def field_of(path: str) -> FieldInfo:
    """The field that a dotted path means; those of algorithm are GRPO's, else opd's. Raises KeyError."""
    record: type[BaseModel] = RunSettings
    *sections, name = path.split(".")
    for section, after in pairwise([*sections, name]):
        if section == "algorithm":
            record = GrpoSettings if after in GrpoSettings.model_fields else OpdSettings
            continue
        annotation = record.model_fields[section].annotation
        record = next(
            c for c in (annotation, *get_args(annotation)) if isinstance(c, type) and issubclass(c, BaseModel)
        )
    return record.model_fields[name]


COMPARED = [row for header, rows in tables() if header == COMPARISON for row in rows]
SET = sorted(
    {
        pair
        for header, rows in tables()
        if header == ["from", "set here"]
        for row in rows
        for pair in in_backticks(row[1])
    }
    | {pair for row in COMPARED for pair in in_backticks(row[3])}
    | {pair for row in COMPARED for pair in in_backticks(row[5]) if pair[1]}
)


def test_the_page_is_read() -> None:
    assert len(COMPARED) > 70 and len(SET) > 90


@pytest.mark.parametrize("key", sorted({key for key, _ in SET}))
def test_key_exists(key: str) -> None:
    assert field_of(key).description or key in RunSettings.model_fields


@pytest.mark.parametrize(("key", "value"), [pair for pair in SET if pair[1]])
def test_value_is_taken(run_file: Path, key: str, value: str) -> None:
    """As it is written here; rules that span settings are not meant."""
    found: Any = load_config(run_file, [f"{key}={value}"])
    for name in key.split("."):
        found = getattr(found, name)
    assert found == load_value(value)


def load_value(text: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return tuple(value) if isinstance(value, list) else value


@pytest.mark.parametrize("row", [row for row in COMPARED if row[4].startswith("`")], ids=lambda row: row[3])
def test_default(row: list[str]) -> None:
    default = field_of(in_backticks(row[3])[0][0]).get_default()
    shown = load_value(row[4].strip("`"))
    assert default == shown and type(default) is type(shown)


def test_metric_names_are_those_of_the_code() -> None:
    names = {
        name for header, rows in tables() if header[0] == "metric" for row in rows for name, _ in in_backticks(row[3])
    }
    source = "".join(path.read_text() for path in (PAGE.parents[1] / "megarl").rglob("*.py"))
    assert len(names) == 9
    assert [name for name in names if f'"{name}"' not in source] == []
