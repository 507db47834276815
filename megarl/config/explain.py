"""Turns pydantic's errors into refusals: the key and its value, the rule, and what to write instead."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from megarl.errors import Refusal


def explain(error: ValidationError, record: type[BaseModel], prefix: str = "") -> Refusal:
    """The first error of `error` as a refusal; keys are named from the top of the file (`prefix` added).

    `record` is the class that was being built: unknown keys are matched against its fields.
    """
    details = error.errors(include_url=False)[0]
    path = [str(part) for part in details["loc"]]
    key = ".".join(([prefix] if prefix else []) + path)
    # A place in a list of records is no name of the schema's.
    names = [part for part in details["loc"] if isinstance(part, str)]
    description = _description(record, names)
    if details["type"] == "extra_forbidden":
        return Refusal(key, "is not a known key", _nearest(record, names, prefix))
    if details["type"] == "missing":
        return Refusal(key, "must be given", f"set {key}{description}")
    value = details["input"]
    shown = f"{key}={_yaml(value)}"
    rule = details["msg"].replace("Input should be", "must be").replace("Value error, ", "")
    if details["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return Refusal(shown, "must be a table of keys", f"write the keys of {key} indented below it")
    if details["type"] in ("tuple_type", "list_type"):
        scalar = isinstance(value, bool | int | float | str)
        return Refusal(
            shown, "must be a list", f"write {key}=[{_yaml(value)}]" if scalar else f"write {key}=[...]{description}"
        )
    if details["type"] == "string_type":
        fix = f"give {key} a text{description}"
        if isinstance(value, bool | int | float):
            fix = f'write it in quotes, "{_yaml(value)}"'
        return Refusal(shown, "must be text", fix)
    if details["type"] == "literal_error":
        return Refusal(shown, rule, _nearest_literal(key, str(value), details.get("ctx", {})["expected"]))
    if details["type"] == "string_pattern_mismatch":
        rule = "must be letters, digits, '.', '_' or '-', and begin with a letter or digit"
    if details["type"] == "string_too_long":
        longest = details.get("ctx", {})["max_length"]
        rule = f"must have at most {longest} characters, and has {len(value)}"
    if details["type"] == "too_long":
        rule = f"must have {details.get('ctx', {})['max_length']} items, and has {len(value)}"
    return Refusal(shown, rule[:1].lower() + rule[1:], f"give {key} such a value{description}")


def _yaml(value: Any) -> str:
    """A value as the user wrote it: null and true, not None and True."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return value if isinstance(value, str) else repr(value)


def _description(record: type[BaseModel], path: list[str]) -> str:
    """The schema's sentence of the field at `path`, in brackets, or nothing."""
    field: FieldInfo | None = None
    current: Any = record
    for part in path:
        current = _record(current)
        if current is None:
            break
        field = current.model_fields.get(part)
        if field is None:
            return ""
        current = field.annotation
    return f" ({field.description.rstrip('.')})" if field and field.description else ""


def _nearest(record: type[BaseModel], path: list[str], prefix: str) -> str:
    """The fix for an unknown key: the known key it most likely stands for, else where to look."""
    known = list(_keys(record))
    leaf, table = path[-1], ".".join(path[:-1])
    siblings = [key for key in known if key.rpartition(".")[0] == table]
    leaves = {key.rpartition(".")[2]: key for key in siblings}
    near = difflib.get_close_matches(leaf, list(leaves), n=1, cutoff=0.5)
    match = leaves[near[0]] if near else ""
    if not match:
        # A key in the wrong section is as common as a slip of the finger: `lr` for `optimizer.lr`.
        elsewhere = {key.rpartition(".")[2]: key for key in reversed(known)}
        near = difflib.get_close_matches(leaf, list(elsewhere), n=1, cutoff=0.8)
        match = elsewhere[near[0]] if near else ""
    dotted = f"{prefix}." if prefix else ""
    if match:
        return f"use {dotted}{match}"
    return f"remove it; the keys there are {', '.join(dotted + key for key in siblings)}"


def _nearest_literal(key: str, value: str, expected: str) -> str:
    choices = re.findall(r"'([^']*)'", expected)
    near = difflib.get_close_matches(value, choices, n=1, cutoff=0.5)
    return f"use {key}={near[0] if near else choices[0]}"


def _keys(record: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """All dotted keys of a record and of the records inside it, in the schema's order."""
    for name, field in record.model_fields.items():
        yield prefix + name
        inner = _record(field.annotation)
        if inner is not None:
            yield from _keys(inner, f"{prefix}{name}.")


def _record(annotation: Any) -> type[BaseModel] | None:
    """The record that a field of this annotation holds, an optional one included; None for other values."""
    for kind in (annotation, *get_args(annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None
