r"""Data of the BRIDGE miniature: problems of three kinds, of which the demonstrations cover two.

The kinds are problems of two, three and four steps; an answer is the last result and the number of steps. The warm-up
shows problems of two steps with their whole chain, and the others given up after two steps, but for a few:

    12+7-5=        12+7=19, 19-5=14: 14:2
    40-3+8-9=      40-3=37, 37+8=45: 45:2

so that the start seldom goes on where it should. Demonstrations are right solutions of problems of two and of three
steps, half each. Rollouts ask, and evaluations too, problems of all kinds, a third each.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from make_arithmetic import Level, Problem, solution_text

from compare import hints
from compare.files import write_rows

#: By number of steps; small numbers, which the tiny policy calculates well.
KINDS = {steps: Level(steps, first=30, operand=9, most=39) for steps in (2, 3, 4)}
#: The kinds that demonstrations cover.
DEMONSTRATED = (2, 3)
#: Share of the warm-up's longer problems that are shown whole.
WHOLE = 0.1


def row(problem: Problem, steps: int | None = None) -> dict[str, object]:
    """A row of a data file, its solution given up after that many steps."""
    found = hints.row(problem, solution_text(problem.steps[:steps], hints.answer_text(problem.steps[:steps])))
    return found | {"data_source": f"{problem.level} steps"}


def rows(
    count: int, source: random.Random, taken: set[str], kinds: Sequence[int] = (*KINDS,)
) -> list[dict[str, object]]:
    """Whole problems of these kinds, as many of each, shuffled."""
    found = [
        row(problem)
        for number, steps in enumerate(kinds)
        for problem in hints.draw(KINDS[steps], (count + number) // len(kinds), source, taken)
    ]
    source.shuffle(found)
    return found


def warmup_rows(count: int, source: random.Random, taken: set[str]) -> Iterator[dict[str, object]]:
    """Of each kind a third."""
    for level in KINDS.values():
        for problem in hints.draw(level, count // len(KINDS), source, taken):
            yield row(problem, None if source.random() < WHOLE else 2)


def make(out: Path, warmup: int, train: int, heldout: int, seed: int = 0) -> None:
    """Write warmup.jsonl, demonstrations.jsonl, train.jsonl and heldout.jsonl into `out`. No question is in two
    files."""
    source = random.Random(f"kinds {seed}")
    taken: set[str] = set()
    evaluated, asked = rows(heldout, source, taken), rows(train, source, taken)
    demonstrations = rows(train, source, taken, DEMONSTRATED)
    shown = list(warmup_rows(warmup, source, taken))
    source.shuffle(shown)
    out.mkdir(parents=True, exist_ok=True)
    write_rows(out / "warmup.jsonl", shown)
    write_rows(out / "demonstrations.jsonl", demonstrations)
    write_rows(out / "train.jsonl", asked)
    write_rows(out / "heldout.jsonl", evaluated)
