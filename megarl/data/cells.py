"""The cells of a row: where they stand, and what is written in them. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

#: Whole floats below it are exact; readers of typed tables make them of ints beside a missing value.
_EXACT = 2.0**53


class Written(str):
    """A number as the text that a file has for it: 0.50 stays apart from 0.5, and no digit is rounded away."""

    __slots__ = ()


class NoText(ValueError):
    """A cell holds something that no text stands for."""


def lookup(row: Mapping[str, Any], column: str) -> Any:
    """The value at a column, None where there is none.

    A column of that very name, dots included, comes first; else dots go into records, and numbers into lists.
    """
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        if isinstance(value, list) and part.isdecimal():
            value = value[int(part)] if int(part) < len(value) else None
            continue
        if not isinstance(value, Mapping):
            return None
        value = value.get(part)
    return value


class Places(Mapping[str, Any]):
    """The names inside a list, whose length differs from row to row: every number, with what is inside each item."""

    def __init__(self, inside: Any = None) -> None:
        self._inside = inside

    def __getitem__(self, place: str) -> Any:
        if not place.isdecimal():
            raise KeyError(place)
        return self._inside

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


def names_at(tables: Iterator[Mapping[str, Any]], column: str) -> tuple[int, list[str]] | None:
    """None where a table of `tables` has the dotted `column`; else how many of its parts lead somewhere in any of
    them, and the names that stand in the next part's place."""
    parts = column.split(".")
    depth, names = 0, dict[str, None]()
    for table in tables:
        if column in table:
            return None
        inside: Any = table
        reached = 0
        while reached < len(parts) and isinstance(inside, Mapping) and parts[reached] in inside:
            inside = inside[parts[reached]]
            if isinstance(inside, list):
                inside = dict(zip(map(str, range(len(inside))), inside, strict=True))
            reached += 1
        if reached == len(parts):
            return None
        if reached > depth:
            depth, names = reached, {}
        if reached == depth and isinstance(inside, Mapping):
            names |= dict.fromkeys(inside)
    return depth, list(names)


def text_of(value: Any) -> str | None:
    """What is written in a cell; None where it is missing, not a number or blank.

    Raises `NoText` for lists and records, and for what is no Unicode text.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, (list, tuple, Mapping)):
        raise NoText("a list or a record")
    if isinstance(value, bool):
        text = "true" if value else "false"
    elif isinstance(value, float) and value.is_integer() and abs(value) < _EXACT:
        text = str(int(value))
    elif isinstance(value, bytes):
        text = _decoded(value)
    else:
        text = str(value)
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise NoText("half a character (a surrogate)") from error
    return text if text.strip() else None


def _decoded(value: bytes) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise NoText("bytes that are not UTF-8") from error


def native(value: Any) -> Any:
    """A cell with its numbers as int and float, for code that computes with them; one beyond both stays a text."""
    if isinstance(value, Written):
        try:
            return int(value)
        except ValueError:
            number = float(value)
        return number if math.isfinite(number) or value.endswith("Infinity") else str(value)
    if isinstance(value, Mapping):
        return {key: native(inner) for key, inner in value.items()}
    return [native(inner) for inner in value] if isinstance(value, (list, tuple)) else value
