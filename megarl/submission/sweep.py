"""A job array's tasks: one value of a configuration key each, and a run name of its own."""

from __future__ import annotations

import re
from dataclasses import dataclass

import yaml

from megarl.errors import Refusal

#: Most tasks of an array that is asked for; Slurm's own limit (MaxArraySize) is 1,000 unless the cluster raises it.
MOST_TASKS = 1000
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_FORM = "write KEY=FIRST..LAST or KEY=VALUE,VALUE,..., such as seeds=0..4 or optimizer.lr=1e-6,2e-6"


@dataclass(frozen=True, slots=True)
class Sweep:
    """The values of `key`, as they stand in an override, and a word for each that makes its run's name."""

    key: str
    values: tuple[str, ...]
    labels: tuple[str, ...]

    def overrides(self, index: int, name: str) -> tuple[str, str]:
        """The two overrides of task `index` of a run called `name`."""
        return f"{self.key}={self.values[index]}", f"name={name}-{self.labels[index]}"


def parse_sweep(text: str) -> Sweep:
    """Read `KEY=LIST`, where LIST has values of YAML and ranges of whole numbers, such as `0..4,7`.

    `seeds` is the key `seed`. Raises `Refusal` for anything else, for too many tasks, and where two tasks would be
    runs of the same name.
    """
    key, separator, listed = text.partition("=")
    key = "seed" if key == "seeds" else key
    value = f"--array {text}"
    if not separator or not all(key.split(".")) or not listed.strip():
        raise Refusal(value, "must be a key and its values", _FORM)
    if key in ("name", "resume", "runs_dir"):
        raise Refusal(value, f"cannot give each task its {key}, which follows from the array", "vary another key")
    values: list[str] = []
    for item in _items(value, listed):
        values += _range(value, item) if ".." in item else [item]
        if len(values) > MOST_TASKS:
            raise Refusal(value, f"must be at most {MOST_TASKS} tasks", "submit it in parts")
    labels = tuple(_label(key, one) for one in values)
    for index, label in enumerate(labels):
        if label in labels[:index]:
            twice = f"{values[labels.index(label)]} and {values[index]}"
            raise Refusal(value, f"gives {twice} the same run name, ending in -{label}", "leave one of them out")
    return Sweep(key, tuple(values), labels)


def _items(value: str, listed: str) -> list[str]:
    """The list's items as they were written; YAML's own parser knows which commas are inside brackets or quotes."""
    text = f"[{listed}]"
    try:
        node = yaml.compose(text, yaml.SafeLoader)
    except yaml.YAMLError:
        # Its reason would speak of brackets that are not the user's.
        node = None
    if not isinstance(node, yaml.SequenceNode):
        raise Refusal(value, "must be a list of YAML values", _FORM)
    items = [_written(text, item) for item in node.value]
    if not all(items):
        raise Refusal(value, "has an empty value", _FORM)
    return items


def _written(text: str, item: yaml.Node) -> str:
    """An item as an override has it: without the quotes that keep its commas and brackets together."""
    if isinstance(item, yaml.ScalarNode) and item.style is not None:
        return item.value
    return text[item.start_mark.index : item.end_mark.index].strip()


def _range(value: str, item: str) -> list[str]:
    match = _RANGE.fullmatch(item)
    if match is None:
        return [item]
    first, last = int(match[1]), int(match[2])
    if last < first:
        raise Refusal(value, f"has a range that ends before it begins, {item}", f"write {last}..{first}")
    # No more than are refused: the last number may be any.
    return [str(number) for number in range(first, min(last, first + MOST_TASKS) + 1)]


def _label(key: str, value: str) -> str:
    """The key's last part and the value, of characters that a run's name may have."""
    return key.rpartition(".")[2] + re.sub(r"[^A-Za-z0-9._-]+", "-", value).strip("-")
