"""From the `algorithm:` table to the settings record that its name asks for. Torch-free for built-in algorithms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from megarl.config import user_code
from megarl.config.algorithms import ALGORITHM_SETTINGS, AlgorithmSettings
from megarl.config.explain import explain
from megarl.errors import Refusal


def algorithm_settings(value: Any) -> AlgorithmSettings:
    """Build an algorithm's settings from its table, or from its bare name.

    The name is one of `ALGORITHM_SETTINGS`, or an import path `package.module:Class` whose class has an
    attribute `Settings` derived from `AlgorithmSettings`. Raises `Refusal`.
    """
    if isinstance(value, AlgorithmSettings):
        return value
    if isinstance(value, str):
        value = {"name": value}
    names = ", ".join(ALGORITHM_SETTINGS)
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        raise Refusal(
            f"algorithm={value!r}",
            "must be a table with a name",
            f"set algorithm.name to {names} or package.module:Class",
        )
    record = settings_class(value["name"])
    try:
        return record.model_validate(dict(value))
    except ValidationError as error:
        raise explain(error, record, prefix="algorithm") from None


def settings_class(name: str) -> type[AlgorithmSettings]:
    """The settings record of a built-in algorithm, or of a class named by its import path."""
    if name in ALGORITHM_SETTINGS:
        return ALGORITHM_SETTINGS[name]
    value = f"algorithm.name={name}"
    if not user_code.FORM.fullmatch(name):
        known = ", ".join(ALGORITHM_SETTINGS)
        raise Refusal(value, "is not an algorithm", f"use one of {known}, or an import path package.module:Class")
    try:
        found = user_code.load(name)
    except user_code.Unusable as error:
        fix = "put the module on PYTHONPATH and name its class"
        raise Refusal(value, f"cannot be imported ({error})", fix) from None
    record = getattr(found, "Settings", None)
    if not (isinstance(record, type) and issubclass(record, AlgorithmSettings)):
        rule = "must name a class with an attribute Settings derived from megarl.config.algorithms.AlgorithmSettings"
        raise Refusal(value, rule, f"give {name.rpartition(':')[2]} such a Settings record")
    return record
