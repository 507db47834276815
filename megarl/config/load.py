"""From a YAML file and `key.path=value` overrides to a checked `RunConfig`, and back. Torch-free.

A file may name one base (`base: other.yaml`, relative to the file); its own keys win over the base's,
table by table. An override replaces the value at its path. Relative paths inside a configuration mean
the working directory. What a value's text means is said in `megarl.config.written`.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from megarl.config.explain import explain
from megarl.config.schema import RunConfig
from megarl.config.written import Given, opened, parse, settled, text_of
from megarl.config.yaml_dialect import Dumper, Plain
from megarl.errors import Refusal

Record = TypeVar("Record", bound=BaseModel)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read the run described by the YAML file `path`, changed by `overrides` (each `key.path=value`).

    Raises `Refusal` for a missing, empty or malformed file, an unknown key, or a value of the wrong
    type or range. Rules that span sections are checked by `megarl.config.rules.check`.
    """
    return config_of(read_with_base(Path(os.path.expanduser(path))), overrides)


def config_of(table: dict[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """The run that a `table` describes, as `read_with_base` reads it, changed by `overrides`. Raises `Refusal`."""
    table = copy.deepcopy(table)
    for override in overrides:
        _apply_override(table, override)
    return record_of(_lists_again(table), RunConfig)


def record_of(table: dict[str, Any], record: type[Record]) -> Record:
    """The record that a table means, as `read_table` reads it. Raises `Refusal`."""
    try:
        return record.model_validate(settled(table, record))
    except ValidationError as error:
        raise explain(error, record) from None


def dump_config(config: RunConfig) -> str:
    """YAML of the whole configuration, defaults included; loading it gives an equal configuration."""
    table = config.model_dump(mode="json")
    return yaml.dump(table, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)


def read_with_base(path: Path) -> dict[str, Any]:
    """A YAML file as a table, its base's keys below its own. Raises `Refusal`."""
    table = read_table(path)
    if "base" not in table:
        return table
    base = settled(table.pop("base"), str, ("base",))
    if not isinstance(base, str):
        raise Refusal(
            f"base={base!r} in {path}", "must be the path of one YAML file", "name a single file, relative to this one"
        )
    base_path = path.parent / os.path.expanduser(base)
    base_table = read_table(base_path)
    if "base" in base_table:
        raise Refusal(
            f"base={base} in {path}",
            "a base may not have a base itself",
            f"move what {base_path} takes from its base into it",
        )
    return merge(base_table, table)


def read_table(path: Path, needed: str = "name, steps, model, algorithm and data") -> dict[str, Any]:
    """One YAML file as a table; `needed` names its keys to whoever gave an empty one.

    Raises `Refusal` where it is missing, unreadable, empty or no table.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise Refusal(
            str(path), "no such configuration file", "give the path of a YAML file, relative to the working directory"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise Refusal(str(path), f"cannot be read as text ({error})", "give the path of a YAML file") from None
    table = parse(text, str(path))
    if table is None:
        raise Refusal(str(path), "is empty", f"write at least {needed}")
    if not isinstance(table, dict):
        raise Refusal(str(path), "must be a table of keys", "write one `key: value` per line")
    return table


def merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """`base` with the keys of `top`; tables are merged, everything else is replaced.

    A table with another `name` is replaced whole: settings of one algorithm mean nothing to another.
    """
    merged = dict(base)
    for key, value in top.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            name = text_of(value.get("name"))
            if name is None or name == text_of(old.get("name")):
                value = merge(old, value)
        merged[key] = value
    return merged


def _apply_override(table: dict[str, Any], override: str) -> None:
    """Set one `key.path=value` in place; what the value means is known with the setting's type."""
    path, separator, text = override.partition("=")
    parts = path.split(".")
    if not separator or not all(parts):
        raise Refusal(f"argument {override!r}", "must have the form key.path=value", "for example optimizer.lr=1e-5")
    for depth, part in enumerate(parts[:-1], start=1):
        child = table.setdefault(part, {})
        if isinstance(child, Given):
            child = table[part] = opened(child)
        if part == "algorithm" and depth == 1 and isinstance(child, Plain | str):
            child = table[part] = {"name": child}
        if isinstance(child, list | _Listed):
            child = table[part] = _by_place(child, parts[depth], ".".join(parts[:depth]), override)
        if not isinstance(child, dict):
            parent = ".".join(parts[:depth])
            raise Refusal(
                f"argument {override!r}", f"{parent} is {text_of(child)} and not a table", f"set {parent} itself"
            )
        table = child
    table[parts[-1]] = Given(text, override)


class _Listed(dict[str, Any]):
    """A list while overrides change its items: each by its place, which counts from 0."""


def _by_place(items: list[Any] | _Listed, place: str, key: str, override: str) -> _Listed:
    """`items` by their places. Raises `Refusal` where there is none at `place`."""
    if place not in map(str, range(len(items))):
        rule = f"{key} is a list of {len(items)}, whose places count from 0"
        raise Refusal(f"argument {override!r}", rule, f"name one of them, or set {key} itself")
    return items if isinstance(items, _Listed) else _Listed({str(number): item for number, item in enumerate(items)})


def _lists_again(value: Any) -> Any:
    if isinstance(value, _Listed):
        return [_lists_again(item) for item in value.values()]
    return {key: _lists_again(item) for key, item in value.items()} if isinstance(value, dict) else value
