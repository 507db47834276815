r"""Data of the AttnRL miniature: problems of six steps, whose worked solutions slip at every step with a chance.

A slip is a wrong result; what follows goes on from it, and the answer is what comes out:

    12+7-5+3-2+8-4=        12+7=19, 19-5=11, 11+3=14, 14-2=12, 12+8=20, 20-4=16: 16

so that the warmed-up policy knows how to calculate, and slips as often as the solutions do. One slip makes an answer
wrong: what has to be learned is not to slip, at each step anew, and an answer's reward does not say where it did.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from make_arithmetic import Level, Problem, solution_text

from compare import hints
from compare.files import write_rows

#: Small numbers, which the tiny policy calculates well.
PROBLEMS = Level(6, first=30, operand=9, most=39)
#: Chance of a slip at a step of the warm-up's solutions.
SLIP = 0.15


def slipped(problem: Problem, source: random.Random) -> str:
    """A worked solution of the problem that slips as often as chance has it."""
    value, steps = problem.operands[0], []
    for sign, operand in zip(problem.signs, problem.operands[1:], strict=True):
        result = value + sign * operand
        if source.random() < SLIP:
            result += source.choice([away for away in range(-9, 10) if away])
        steps.append(f"{value}{'+' if sign > 0 else '-'}{operand}={result}")
        value = result
    return solution_text(steps, str(value))


def rows(problems: Iterator[Problem]) -> list[dict[str, object]]:
    """Problems with right solutions, as rows of a data file."""
    return [problem.row(boxed=True) for problem in problems]


def make(out: Path, warmup: int, train: int, heldout: int, seed: int = 0) -> None:
    """Write warmup.jsonl, train.jsonl and heldout.jsonl into `out`. No question is in two files."""
    source = random.Random(f"slips {seed}")
    taken: set[str] = set()
    evaluated = rows(hints.draw(PROBLEMS, heldout, source, taken))
    asked = rows(hints.draw(PROBLEMS, train, source, taken))
    shown = [
        problem.row(boxed=True) | {"solution": slipped(problem, source)}
        for problem in hints.draw(PROBLEMS, warmup, source, taken)
    ]
    out.mkdir(parents=True, exist_ok=True)
    write_rows(out / "warmup.jsonl", shown)
    write_rows(out / "train.jsonl", asked)
    write_rows(out / "heldout.jsonl", evaluated)
