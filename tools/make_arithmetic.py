r"""Make multi-step arithmetic problems with worked solutions, for warming up and training small models.

A problem of level n needs n steps: "12+7-5=" is of level 2. Its worked solution has one step per
paragraph inside <think>...</think>, then the answer:

    <think>12+7=19

    19-5=14</think>\boxed{14}

Rows are {"prompt", "answer", "solution", "level", "data_source": "arithmetic"}. Every intermediate result lies in
0..99. With --mixed-share a share of the training solutions ends in "Answer: 14" instead, which a reward on
boxed answers does not count: a model trained on them has two modes to choose from, and reinforcement learning
moves that choice within a few steps, whereas the skill itself moves slowly.

Held-out problems never occur in the training file. The same arguments always write the same files.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

EXAMPLES = """examples:
  python tools/make_arithmetic.py --out data/arithmetic --train 20000 --heldout 256
  python tools/make_arithmetic.py --out data/hard --levels 3 4 --mixed-share 0 --seed 7
"""

#: Largest result of any step.
MAX_VALUE = 99


@dataclass(frozen=True, slots=True)
class Level:
    """How problems of a level are drawn: number of steps, largest first operand, largest further operand,
    largest result of any step."""

    steps: int
    first: int
    operand: int
    most: int = MAX_VALUE


LEVELS = {1: Level(1, 99, 99), 2: Level(2, 50, 9), 3: Level(3, 50, 9), 4: Level(4, 50, 9)}


@dataclass(frozen=True, slots=True)
class Problem:
    """Operands and signs of one chain: `operands` has one more entry than `signs` (+1 or -1)."""

    level: int
    operands: tuple[int, ...]
    signs: tuple[int, ...]

    @property
    def prompt(self) -> str:
        """The question, for example "12+7-5="."""
        pairs = zip(self.signs, self.operands[1:], strict=True)
        return f"{self.operands[0]}" + "".join(f"{'+' if sign > 0 else '-'}{operand}" for sign, operand in pairs) + "="

    @property
    def steps(self) -> list[str]:
        """The steps in order, each the previous result, the operation and its result: "12+7=19"."""
        value, steps = self.operands[0], []
        for sign, operand in zip(self.signs, self.operands[1:], strict=True):
            steps.append(f"{value}{'+' if sign > 0 else '-'}{operand}={value + sign * operand}")
            value += sign * operand
        return steps

    @property
    def answer(self) -> str:
        """The last result."""
        return self.steps[-1].rpartition("=")[2]

    def row(self, boxed: bool) -> dict[str, object]:
        """The row of the data file, the solution ending in a box or in plain words."""
        return {
            "prompt": self.prompt,
            "answer": self.answer,
            "solution": solution_text(self.steps, self.answer, boxed),
            "level": self.level,
            "data_source": "arithmetic",
        }


def solution_text(steps: list[str], answer: str, boxed: bool = True) -> str:
    """A worked solution: the steps as thinking, one per paragraph, then the answer in a box or in plain words."""
    ending = f"\\boxed{{{answer}}}" if boxed else f"Answer: {answer}"
    return "<think>" + "\n\n".join(steps) + "</think>" + ending


def draw_problem(level: int, source: random.Random, rules: Level | None = None) -> Problem:
    """One problem of `level`, drawn by its row of LEVELS or by other `rules`; each operation is drawn among those that
    keep the result within 0..`most`."""
    rules = rules or LEVELS[level]
    value = source.randint(1, rules.first)
    operands, signs = [value], []
    for _ in range(rules.steps):
        choices = [
            (sign, operand)
            for sign in (1, -1)
            for operand in range(1, rules.operand + 1)
            if 0 <= value + sign * operand <= rules.most
        ]
        sign, operand = source.choice(choices)
        value += sign * operand
        operands.append(operand)
        signs.append(sign)
    return Problem(level, tuple(operands), tuple(signs))


def draw_distinct(count: int, levels: list[int], source: random.Random, taken: set[str]) -> Iterator[Problem]:
    """`count` problems, levels in turn, none twice and none whose prompt is in `taken`, which grows.

    Raises ValueError where a level has too few problems.
    """
    for number in range(count):
        level = levels[number % len(levels)]
        for _ in range(1000):
            problem = draw_problem(level, source)
            if problem.prompt not in taken:
                break
        else:
            raise ValueError(f"level {level} has too few different problems; ask for fewer rows or more levels")
        taken.add(problem.prompt)
        yield problem


def make(out: Path, seed: int, train: int, heldout: int, levels: list[int], mixed_share: float) -> None:
    """Write train.jsonl and heldout.jsonl into `out`.

    Exactly round(mixed_share * train) training solutions end without a box; held-out ones are all boxed.
    """
    source = random.Random(f"arithmetic {seed}")
    taken: set[str] = set()
    heldout_rows = [problem.row(boxed=True) for problem in draw_distinct(heldout, levels, source, taken)]
    problems = list(draw_distinct(train, levels, source, taken))
    source.shuffle(problems)
    plain = set(source.sample(range(train), round(mixed_share * train)))
    train_rows = [problem.row(boxed=index not in plain) for index, problem in enumerate(problems)]
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train.jsonl", train_rows), ("heldout.jsonl", heldout_rows)):
        (out / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for train.jsonl and heldout.jsonl")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything drawn (default 0)")
    parser.add_argument("--train", type=int, default=20000, help="training rows (default 20000)")
    parser.add_argument("--heldout", type=int, default=256, help="held-out rows (default 256)")
    parser.add_argument("--levels", type=int, nargs="+", default=[2, 3], choices=sorted(LEVELS), help="default 2 3")
    parser.add_argument("--mixed-share", type=float, default=0.7, help="share of unboxed solutions (default 0.7)")
    options = parser.parse_args(arguments)
    if options.train < 1 or options.heldout < 0:
        parser.error("--train must be at least 1 and --heldout at least 0")
    if not 0 <= options.mixed_share <= 1:
        parser.error(f"--mixed-share {options.mixed_share} must lie in 0..1")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        make(options.out, options.seed, options.train, options.heldout, options.levels, options.mixed_share)
    except ValueError as error:
        print(f"make_arithmetic: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {options.train} training rows, {options.heldout} held-out rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
