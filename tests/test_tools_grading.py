"""Benchmarks' references in natural rewritings, and hostile answers, through the grading processes."""

from __future__ import annotations

import importlib
import itertools
import sys
from pathlib import Path

import pytest

from megarl.config.rewards import RewardSettings
from megarl.rewards.answers import GradingItem
from megarl.rewards.grader import Grader
from megarl.rewards.math import math_equals
from megarl.rewards.notation import written

ROOT = Path(__file__).resolve().parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"
sys.path.insert(0, str(ROOT / "tools"))

benchmarks = importlib.import_module("grading.benchmarks")
hostile = importlib.import_module("grading.hostile")
rewritings = importlib.import_module("grading.rewritings")


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason=f"{SHARED_DATA} is absent")
@pytest.mark.parametrize("name", benchmarks.NAMES)
def test_references_are_right_in_every_natural_writing(name: str) -> None:
    """Up to 60 references of each benchmark, the longest first; tools/measure_grading.py takes all."""
    rows = benchmarks.references(SHARED_DATA, name)
    distinct = sorted({one for row in rows for one in row if one.strip()}, key=lambda one: (-len(one), one))
    chosen = distinct[:30] + distinct[30 :: max(1, len(distinct) // 30)]
    wrong = [
        (reference, kind)
        for reference in chosen
        for kind, text in rewritings.rewritings(reference)
        if not math_equals(text, reference)
    ]
    assert wrong == []
    others = [(a, b) for a, b in itertools.pairwise(chosen) if not any(a in row and b in row for row in rows)]
    assert [
        (a, b)
        for a, b in others
        if written(a).replace(" ", "") != written(b).replace(" ", "") and math_equals(rf"\boxed{{{b}}}", a)
    ] == []


def test_hostile_answers_neither_hang_nor_kill_nor_are_right() -> None:
    cases = hostile.hostile_answers(150, seed=3)
    assert {family for family, _, _ in cases} == set(hostile.FAMILIES)
    with Grader(RewardSettings(kind="math", workers=2, time_limit=5.0)) as grader:
        graded = grader.grade([GradingItem(text, reference) for _, text, reference in cases])
    assert [case for case, one in zip(cases, graded, strict=True) if one.counter or one.reward] == []
