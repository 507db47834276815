r"""Data of the ExPO miniature: easy problems asked plainly, and easy and hard ones asked with the answer as a hint.

A hard problem has three steps, an easy one two; an answer is the last result and the number of steps. The warm-up shows

- easy questions asked plainly, with their chain:       12+7-5=                   12+7=19, 19-5=14: 14:2
- easy and hard questions with the answer as a hint:    12+7-5+3=17:3 Explain:    12+7=19, 19-5=14, 14+3=17: 17:3
- hard questions asked plainly, given up after two steps:  40-3+8-9=              40-3=37, 37+8=45: 45:2

so that the start can explain a known answer in three steps, and asked plainly stops after two, whatever the question.
As the answer counts the steps, no slip in calculating two steps can make it right: the start solves no hard problem by
accident.
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
PLAIN_EASY, HINTED_EASY, HINTED_HARD, PLAIN_HARD = 0.35, 0.15, 0.35, 0.15


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
    """The answer that `steps` end with: the last one's result, and how many they are, "17:3"."""
    return f"{steps[-1].rpartition('=')[2]}:{len(steps)}"


def expert_solution(problem: Problem) -> str:
    """A right solution in a manner that is not the policy's: it sums the operations up from the last to the first."""
    value, steps = 0, []
    for sign, operand in reversed(list(zip(problem.signs, problem.operands[1:], strict=True))):
        steps.append(f"{value}{'+' if sign > 0 else '-'}{operand}={value + sign * operand}")
        value += sign * operand
    steps.append(f"{problem.operands[0]}{value:+d}={problem.answer}")
    return solution_text(steps, answer_text(problem.steps))


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
