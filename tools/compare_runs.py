"""Whether two runs made the same numbers to the last bit, and where they part first.

Compared are, in this order: metrics.jsonl line by line, samples.jsonl, evaluations/*.jsonl, and, of each step whose
checkpoint both have, the digests of weights and moments in its progress.json. Every value counts, but for those that
no two runs share even where they compute the same:

  seconds, time_shares    how long the phases took
  peak_memory_bytes, memory_bytes, tensor_bytes
                          depend on what else the process and the machine hold

Exit code: 0 equal, 1 different, 2 nothing that can be compared.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

EXAMPLES = """examples:
  python tools/compare_runs.py before/runs/quickstart after/runs/quickstart
  python tools/compare_runs.py A B --steps 6
  python tools/compare_runs.py A B --leave-out counters entropy
"""
#: Names in any line that are never compared; the docstring says why.
LEFT_OUT = ("seconds", "time_shares", "peak_memory_bytes", "memory_bytes", "tensor_bytes")
#: Stands for a value that one of the two does not have.
MISSING = "nothing of that name"


class BadInput(Exception):
    """A folder that cannot be compared, in words."""


class Difference(NamedTuple):
    """Where two runs part: a place in words, the value's name, and both values as Python writes them."""

    place: str
    name: str
    first: str
    second: str

    def __str__(self) -> str:
        return f"{self.place}: {self.name} is {self.first} in the first run and {self.second} in the second"


def differences(
    first: Any, second: Any, name: str = "", left_out: Sequence[str] = ()
) -> Iterator[tuple[str, Any, Any]]:
    """Each value in which two records differ, as its dotted name and both values.

    Numbers are the same where all their bits are: 0.0 is not -0.0, and an integer is not a float.
    """
    if isinstance(first, dict) and isinstance(second, dict):
        for key in dict.fromkeys((*first, *second)):
            if key not in left_out:
                inner = f"{name}.{key}" if name else str(key)
                yield from differences(first.get(key, MISSING), second.get(key, MISSING), inner, left_out)
    elif isinstance(first, list) and isinstance(second, list) and len(first) == len(second):
        for number, (one, other) in enumerate(zip(first, second, strict=True)):
            yield from differences(one, other, f"{name}.{number}", left_out)
    elif repr(first) != repr(second):
        yield name, first, second


def of_lines(
    kind: str, first: Sequence[dict[str, Any]], second: Sequence[dict[str, Any]], left_out: Sequence[str]
) -> Iterator[Difference]:
    """The differences of two files of records, `kind`, in their order."""
    for number, (one, other) in enumerate(zip(first, second, strict=False), start=1):
        # A line without a step is named by its number.
        place = f"step {one['step']} ({kind})" if "step" in one else f"line {number} of {kind}"
        for name, mine, others in differences(one, other, left_out=left_out):
            yield Difference(place, name, _shown(mine), _shown(others))
    if len(first) != len(second):
        yield Difference(kind, "the number of lines", str(len(first)), str(len(second)))


def compare(
    first: Path, second: Path, steps: int | None = None, left_out: Sequence[str] = LEFT_OUT
) -> Iterator[Difference]:
    """All differences of two run folders, the earliest first within each file; with `steps` those up to that step.

    Raises `BadInput` where a folder is none of a run's, or a line cannot be read.
    """
    last = math.inf if steps is None else steps
    lines = [_up_to(last, _read(folder / "metrics.jsonl")) for folder in (first, second)]
    for folder, found in zip((first, second), lines, strict=True):
        if not found:
            raise BadInput(f"{folder} has no step in its metrics.jsonl up to which it could be compared")
    yield from of_lines("metrics.jsonl", lines[0], lines[1], left_out)
    samples = [_up_to(last, _read(folder / "samples.jsonl", may_lack=True)) for folder in (first, second)]
    yield from of_lines("samples.jsonl", samples[0], samples[1], left_out)
    for name in _both("evaluations/*.jsonl", first, second):
        if _number(Path(name).stem) <= last:
            one, other = (_read(folder / name, may_lack=True) for folder in (first, second))
            yield from of_lines(name, one, other, left_out)
    yield from _of_checkpoints(first, second, last)


def _of_checkpoints(first: Path, second: Path, last: float) -> Iterator[Difference]:
    for name in _both("checkpoints/step_*/progress.json", first, second):
        files = [folder / name for folder in (first, second)]
        step = _number(Path(name).parent.name)
        if step > last or not all(file.is_file() for file in files):
            continue
        notes = [_read_json(file, file.read_text(encoding="utf-8")) for file in files]
        digests = [{key: note[key] for key in ("weights", "moments", "sets") if key in note} for note in notes]
        for key, mine, others in differences(digests[0], digests[1]):
            yield Difference(f"step {step} (checkpoint)", f"the digest of {key}", _shown(mine), _shown(others))


def _both(pattern: str, first: Path, second: Path) -> list[str]:
    """Files that either folder has, by their names in it, in order."""
    return sorted({str(file.relative_to(folder)) for folder in (first, second) for file in folder.glob(pattern)})


def _number(name: str) -> float:
    """The step in a name such as step_000010; infinity where it has none, as an evaluation apart from a run's."""
    digits = name.removeprefix("step_")
    return int(digits) if digits.isdecimal() else math.inf


def _up_to(last: float, lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in lines if line.get("step", 0) <= last]


def _read(file: Path, *, may_lack: bool = False) -> list[dict[str, Any]]:
    if not file.is_file():
        if may_lack:
            return []
        raise BadInput(f"{file} is missing, so {file.parent} is no run that can be compared")
    return [_read_json(file, text) for text in file.read_text(encoding="utf-8").splitlines()]


def _read_json(file: Path, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise BadInput(f"{file} has text that is no JSON ({error})") from None
    if not isinstance(found, dict):
        raise BadInput(f"{file} has JSON that is no record: {_shown(found)}")
    return found


def _shown(value: Any) -> str:
    text = value if value is MISSING else repr(value)
    return text if len(text) <= 200 else f"{text[:197]}..."


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare as the command line says; returns the exit code."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=form)
    parser.add_argument("first", type=Path, metavar="A", help="folder of a run")
    parser.add_argument("second", type=Path, metavar="B", help="folder of the other")
    parser.add_argument("--steps", type=int, metavar="N", help="compare the first N steps alone (default: all)")
    parser.add_argument(
        "--leave-out",
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"further names to leave out than {', '.join(LEFT_OUT)}",
    )
    given = parser.parse_args(arguments)
    left_out = (*LEFT_OUT, *given.leave_out)
    try:
        found = next(compare(given.first, given.second, given.steps, left_out), None)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if found is not None:
        print(found)
        return 1
    print(f"the same to the last bit; left out: {', '.join(left_out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
