"""The answers of runs for the page's browser: of training, of evaluations and of suites, packed so that many stay few
bytes.

A row is a list, by `COLUMNS`; where an answer came from is a number, by the payload's `places`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megarl.report.charts import short
from megarl.report.difficulty import evaluation_files
from megarl.report.runs import Run, objects_of, read_lines

COLUMNS = (
    "run", "place", "step", "prompt_index", "draw", "number", "branch", "fork", "source", "level", "prompt", "answer",
    "text", "reward", "right", "finish", "length", "advantage", "pieces", "terms",
)  # fmt: skip
#: Answers of a run's training that a page has at most, and bytes of their lines; of more, whole steps are left out,
#: evenly. Our choice: what a browser still searches at once.
MOST, BYTES = 100_000, 128 << 20
#: Answers of an evaluation or of a suite's benchmark that a page has at most: the first.
OF_FILE = 5_000

_STEP = re.compile(rb'\{"step": (\d+)')


def samples_of(runs: Sequence[Run]) -> tuple[dict[str, Any], list[str]]:
    """What the browser of samples is filled with, and remarks about what is left out."""
    places: dict[str, int] = {}
    rows: list[list[Any]] = []
    remarks: list[str] = []
    for number, run in enumerate(runs):
        for place, step, found, said in _of_run(run):
            where = places.setdefault(place, len(places))
            rows += [_row(number, where, step, row) for row in found]
            remarks += [f"{run.name}: {one}" for one in said]
    # Arrays of numbers and texts alone: names come once.
    return {"columns": COLUMNS, "places": list(places), "rows": rows}, remarks


def _of_run(run: Run) -> Iterator[tuple[str, int | None, list[dict[str, Any]], list[str]]]:
    """Places, the step where all their answers are of one, the answers, and remarks."""
    found, said = _of_training(run.directory / "samples.jsonl")
    yield "training", None, found, said
    for step, file in evaluation_files(run.directory):
        yield from _of_file("evaluation", step, file)
    last = run.steps[-1]["step"] if run.steps else 0
    for file in sorted(run.directory.glob("suites/*/*.jsonl")):
        if file.stem.endswith(".partial"):
            # Answers of a suite that is not done yet.
            continue
        yield from _of_file(f"{file.parent.name}: {file.stem}", last, file)


def _of_file(place: str, step: int, file: Path) -> Iterator[tuple[str, int, list[dict[str, Any]], list[str]]]:
    lines = read_lines(file)
    said = lines.remarks(file.name)
    if len(lines.rows) > OF_FILE:
        said.append(f"{file.name}: the first {OF_FILE} of {len(lines.rows)} answers")
    yield place, step, lines.rows[:OF_FILE], said


def _of_training(file: Path) -> tuple[list[dict[str, Any]], list[str]]:
    if not file.is_file():
        return [], []
    lines = file.read_bytes().split(b"\n")
    count = len(lines) - (not lines[-1])
    every = max(math.ceil(count / MOST), math.ceil(sum(map(len, lines)) / BYTES), 1)
    steps = [int(match[1]) if (match := _STEP.match(one)) else None for one in lines]
    number = {step: place for place, step in enumerate(dict.fromkeys(one for one in steps if one is not None))}
    kept = [one for one, step in zip(lines, steps, strict=True) if step is None or number[step] % every == 0]
    found = objects_of(kept)
    said = found.remarks(file.name)
    if every > 1:
        said.append(f"samples of every {every} steps, {len(found.rows)} of {count}, are in this page")
    return found.rows, said


def _row(run: int, place: int, step: int | None, row: dict[str, Any]) -> list[Any]:
    text, pieces = _pieces(row)
    right = row.get("right", row.get("correct"))
    terms = row.get("reward_terms")
    return [
        run,
        place,
        row.get("step") if step is None else step,
        row.get("prompt_index", row.get("index")),
        row.get("draw", 0),
        row.get("sample_index", row.get("sample", 0)),
        row.get("branch", []),
        row.get("fork", 0),
        _text(row.get("source")),
        _text(row.get("level")),
        _text(row.get("prompt", row.get("problem"))),
        _text(row.get("answer", row.get("reference"))),
        text,
        short(row.get("reward", row.get("score"))),
        right if isinstance(right, bool) else None,
        _text(row.get("finish_reason")),
        short(row.get("length")),
        short(row.get("advantage")),
        pieces,
        terms if isinstance(terms, dict) else None,
    ]


def _pieces(row: dict[str, Any]) -> tuple[str, list[list[Any]]]:
    """The whole response, and its pieces as characters, by whom, whether trained, the advantage, and the characters of
    each token; characters as a browser counts them."""
    found = [one for one in row.get("pieces") or row.get("turns") or () if isinstance(one, dict)]
    if not found:
        text = _text(row.get("response", row.get("text")))
        return text, [[_units(text), "policy", 0, None, None]]
    text = "".join(_text(piece.get("text")) for piece in found)
    pieces = []
    for piece in found:
        own = _text(piece.get("text"))
        sizes = _in_units(own, piece.get("sizes"))
        trained = int("advantage" in piece)
        pieces.append([_units(own), _text(piece.get("by")) or "policy", trained, short(piece.get("advantage")), sizes])
    return text, pieces


def _units(text: str) -> int:
    """The length of a text in units of UTF-16."""
    return len(text) if text.isascii() else len(text) + sum(character > "\uffff" for character in text)


def _in_units(text: str, sizes: Iterable[int] | None) -> list[int] | None:
    if sizes is None or text.isascii():
        return None if sizes is None else list(sizes)
    found, place = [], 0
    for size in sizes:
        found.append(_units(text[place : place + size]))
        place += size
    return found


def _text(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else str(value)


def counts(payload: dict[str, Any]) -> Counter[str]:
    """How many answers a payload has of each place."""
    return Counter(payload["places"][row[1]] for row in payload["rows"])
