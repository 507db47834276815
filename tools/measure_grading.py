"""Measure the grading of mathematical answers, through the grading processes of a run.

references: every reference of the benchmarks in --data against itself and its natural rewritings, which must all be
right, and against references of other problems; prints each exception, and each pair that is graded right.
hostile: --count hostile answers (fuzzed LaTeX, loops of 100 kB, towers of powers, nested boxes and fractions); none may
run into its time limit or end its process.

Exit code 1 where one does not hold.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from pathlib import Path

from grading.benchmarks import NAMES, references
from grading.hostile import hostile_answers
from grading.rewritings import rewritings

from megarl.config.rewards import RULE_KINDS, RewardSettings
from megarl.rewards.answers import GradedAnswer, GradingItem
from megarl.rewards.grader import Grader

EXAMPLES = """examples:
  python tools/measure_grading.py references --data ../shared/data
  python tools/measure_grading.py hostile --count 10000
"""


def graded(items: list[GradingItem], options: argparse.Namespace) -> tuple[list[GradedAnswer], float]:
    """The answers' rewards, and the seconds that grading took, without the start of the processes."""
    settings = RewardSettings(
        kind=options.rule, workers=options.workers, time_limit=options.time_limit, max_failed_share=1.0
    )
    with Grader(settings) as grader:
        grader.grade([GradingItem("\\boxed{1}", "1")] * options.workers * 4)
        start = time.monotonic()
        answers = grader.grade(items)
        return answers, time.monotonic() - start


def check_rewritings(folder: Path, name: str, options: argparse.Namespace) -> int:
    """Grade every rewriting of every distinct reference of a benchmark, or the reference itself in a box alone; the
    number that is not right."""
    distinct = sorted({one for row in references(folder, name) for one in row if one.strip()})
    itself = (lambda one: [("itself", rf"\boxed{{{one}}}")]) if options.itself else rewritings
    cases = [(reference, kind, text) for reference in distinct for kind, text in itself(reference)]
    answers, seconds = graded([GradingItem(text, ref) for ref, _, text in cases], options)
    wrong = [case for case, answer in zip(cases, answers, strict=True) if answer.reward != 1.0]
    print(
        f"{name}: {len(distinct)} references, {len(cases)} rewritings, {len(wrong)} not right, {seconds:.0f} s",
        flush=True,
    )
    for reference, kind, text in wrong[: options.show]:
        print(f"  not right: {kind}: {text!r} for {reference!r}")
    return len(wrong)


def check_others(folder: Path, name: str, options: argparse.Namespace) -> int:
    """Grade references of other problems against each reference; prints those that are right, returns their number."""
    rows = [row for row in references(folder, name) if all(one.strip() for one in row)]
    distinct = sorted({row[0] for row in rows})
    rng = random.Random(0)
    pairs = [(one, other) for one in distinct for other in distinct if one != other]
    pairs = rng.sample(pairs, min(options.pairs, len(pairs)))
    items = [GradingItem(rf"\boxed{{{other}}}", one) for one, other in pairs]
    answers, seconds = graded(items, options)
    right = [pair for pair, answer in zip(pairs, answers, strict=True) if answer.reward == 1.0]
    print(f"{name}: {len(pairs)} pairs of different references, {len(right)} graded right, {seconds:.0f} s", flush=True)
    for one, other in right[: options.show]:
        print(f"  graded right: {other!r} for {one!r}")
    return len(right)


def check_hostile(options: argparse.Namespace) -> int:
    """Grade hostile answers, family by family; the number that ran into the limit or ended a process."""
    cases = hostile_answers(options.count, options.seed)
    failed, total = 0, 0.0
    for family in sorted({family for family, _, _ in cases}):
        own = [(text, reference) for one, text, reference in cases if one == family]
        answers, seconds = graded([GradingItem(text, ref) for text, ref in own], options)
        counters = Counter(answer.counter for answer in answers if answer.counter)
        right = sum(answer.reward == 1.0 for answer in answers)
        print(
            f"{family}: {len(own)} answers, {len(own) / seconds:.0f}/s, {right} right, {dict(counters)}",
            flush=True,
        )
        for (text, reference), answer in zip(own, answers, strict=True):
            if (answer.counter or answer.reward == 1.0) and options.show:
                print(f"  {answer.counter or 'right'}: {text[:150]!r} ({len(text)} characters) for {reference!r}")
        failed, total = failed + sum(counters.values()), total + seconds
    print(f"all: {len(cases)} answers, {len(cases) / total:.0f}/s, {failed} failed")
    return failed


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("references", "hostile"))
    parser.add_argument("--data", type=Path, help="folder with the benchmarks' files")
    parser.add_argument("--benchmarks", nargs="+", default=list(NAMES), choices=NAMES)
    parser.add_argument("--rule", default="math", choices=RULE_KINDS)
    parser.add_argument("--itself", action="store_true", help="each reference in a box, in no other writing")
    parser.add_argument("--pairs", type=int, default=20000, help="pairs of different references per benchmark")
    parser.add_argument("--count", type=int, default=10000, help="hostile answers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--time-limit", type=float, default=5.0, help="seconds of processor time per answer")
    parser.add_argument("--show", type=int, default=50, help="exceptions to print")
    options = parser.parse_args(arguments)
    if options.what == "hostile":
        return int(check_hostile(options) > 0)
    if options.data is None:
        parser.error("references needs --data")
    wrong = 0
    for name in options.benchmarks:
        wrong += check_rewritings(options.data, name, options)
        if options.pairs:
            check_others(options.data, name, options)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
