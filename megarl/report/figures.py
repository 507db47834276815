"""How a run's numbers are said: to the terminal, at its end, and on its curves."""

from __future__ import annotations

from typing import Any


def clock_time(seconds: float) -> str:
    """Hours, minutes and seconds, the days before them.

    >>> clock_time(75), clock_time(3675), clock_time(90000)
    ('1:15', '1:01:15', '1 d 1:00:00')
    """
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if not hours:
        return f"{minute}:{second:02}"
    return (f"{days} d " if days else "") + f"{hour}:{minute:02}:{second:02}"


def problems(values: dict[str, Any]) -> str:
    """The problems of an evaluation, and whether they are held out; `values` is its line of metrics.jsonl."""
    count, trained = values.get("evaluation_problems", 0), values.get("evaluation_problems_in_training_data")
    if trained is None:
        return f"{count} problems"
    if trained == 0:
        return f"{count} held-out problems"
    if trained == count:
        return f"{count} problems of the training data"
    return f"{count} problems, {trained} of them in the training data"


def rate(values: dict[str, Any]) -> float | None:
    """Tokens that a step trained on, prompts included, per second of the whole step; None where it has no such."""
    seconds = sum(values.get("seconds", {}).values())
    return values["tokens"] / seconds if values.get("tokens") and seconds else None


def flat(values: dict[str, Any]) -> dict[str, int | float]:
    """The numbers of a line of metrics.jsonl; those of an inner table are named `table/name`."""
    leveled = one_level(values)
    return {n: v for n, v in leveled.items() if isinstance(v, int | float) and not isinstance(v, bool)}


def one_level(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A line without inner tables, whose values are named `table/name`."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= one_level(value, f"{prefix}{name}/") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found
