r"""Data of the ExPO miniature: easy problems asked plainly, and easy and hard ones asked with the answer as a hint.

A hard problem has three steps, an easy one two; its answer is the list of the results of all of them. The warm-up shows

- easy questions asked plainly, with their chain:       12+7-5=                   12+7=19, 19-5=14: 19,14
- easy and hard questions with the answer as a hint:    12+7-5+3=19,14,17 Explain:   12+7=19, 19-5=14, 14+3=17: 19,14,17
- hard questions asked plainly, given up after two steps:  40-3+8-9=              40-3=37, 37+8=45: 37,45

so that the start can explain a known answer in three steps, and asked plainly stops after two, whatever the question.
As the answer lists every result, neither a left-out step nor a slip in calculating can make an answer of two results
right: the start solves no hard problem by accident.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from make_arithmetic import Level, Problem, draw_problem, solution_text

from compare.files import write_rows

#: Algorithm setting `explanation.template` that the warm-up's hinted questions are written in.
TEMPLATE = "{prompt}{answer}\nExplain:"
#: Texts of the template that the tokenizer should know as one token.
MARKERS = ("Explain:",)
#: Small numbers, which the tiny policy calculates well: whether it takes the third step is what matters here.
EASY, HARD = (Level(steps, first=30, operand=9, most=39) for steps in (2, 3))
#: Shares of the warm-up's rows.
PLAIN_EASY, HINTED_EASY, HINTED_HARD, PLAIN_HARD = 0.35, 0.15, 0.45, 0.05


def draw(
    level: Level,
    count: int,
    source: random.Random,
    taken: set[str],
    accepts: Callable[[Problem], bool] = lambda problem: True,
) -> Iterator[Problem]:
    """`count` problems that `accepts` takes; none twice, and none in `taken`, which grows.

    Raises ValueError where there are too few.
    """
    for _ in range(count):
        for _ in range(1000):
            problem = draw_problem(level.steps, source, level)
            if problem.prompt not in taken and accepts(problem):
                break
        else:
            raise ValueError(f"there are too few different problems of {level.steps} steps; ask for fewer rows")
        taken.add(problem.prompt)
        yield problem


def answer_text(steps: Sequence[str]) -> str:
    """The answer that `steps` end with: the result of each, "19,14,17"."""
    return ",".join(step.rpartition("=")[2] for step in steps)


def expert_solution(problem: Problem) -> str:
    """A right solution in a manner that is not the policy's: each step calculates from the beginning."""
    steps = problem.steps
    results = answer_text(steps)
    left = [problem.prompt.removesuffix("=")]
    for operand in reversed(problem.operands[2:]):
        left.insert(0, left[0][: -len(f"+{operand}")])
    lines = [f"{terms}={result}" for terms, result in zip(left, results.split(","), strict=True)]
    return solution_text(lines, results)


def row(problem: Problem, solution: str, hinted: bool = False) -> dict[str, object]:
    """A row of a data file; the question carries the hint where `hinted`."""
    prompt, answer = problem.prompt, answer_text(problem.steps)
    if hinted:
        prompt = TEMPLATE.replace("{prompt}", prompt).replace("{answer}", answer)
    return {
        "prompt": prompt,
        "answer": answer,
        "solution": solution,
        "level": problem.level,
        "data_source": "arithmetic",
    }


def warmup_rows(count: int, source: random.Random, taken: set[str]) -> Iterator[dict[str, object]]:
    """The warm-up in its four parts, shuffled by the caller; all problems are new ones."""
    parts = (
        (PLAIN_EASY, EASY, False, EASY.steps),
        (HINTED_EASY, EASY, True, EASY.steps),
        (HINTED_HARD, HARD, True, HARD.steps),
        (PLAIN_HARD, HARD, False, HARD.steps - 1),
    )
    for share, level, hinted, steps in parts:
        for problem in draw(level, round(share * count), source, taken):
            shown = problem.steps[:steps]
            yield row(problem, solution_text(shown, answer_text(shown)), hinted)


def make(out: Path, warmup: int, train: int, heldout: int, seed: int = 0) -> None:
    """Write warmup.jsonl, and train.jsonl and heldout.jsonl (hard questions with an expert's solutions) into `out`. No
    question is in two files."""
    source = random.Random(f"hints {seed}")
    taken: set[str] = set()
    heldout_rows = [row(problem, expert_solution(problem)) for problem in draw(HARD, heldout, source, taken)]
    hard = [row(problem, expert_solution(problem)) for problem in draw(HARD, train, source, taken)]
    rows = list(warmup_rows(warmup, source, taken))
    source.shuffle(rows)
    out.mkdir(parents=True, exist_ok=True)
    write_rows(out / "warmup.jsonl", rows)
    write_rows(out / "train.jsonl", hard)
    write_rows(out / "heldout.jsonl", heldout_rows)
