"""Rules that say what they took for the answer and why, and `megarl grade`, which prints it for a file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megarl.cli.main import app
from megarl.errors import Refusal
from megarl.rewards.math import decide

#: Rule, response, reference; whether it is right, what is taken, and a part of the reason.
DECISIONS = [
    ("math", r"so \boxed{\frac12}", "0.5", True, r"\frac12", "the last box; equal (as numbers: "),
    ("math", "The answer is 42.", "42", True, "42.", "what 'answer is' states; equal (the same text but for layout"),
    ("math", "It is not 42.", "42", False, None, "is negated, left open, or states nothing"),
    ("math", "hm", "42", False, None, "no box, no statement, no mathematics and no number in the last 2000 characters"),
    ("math", r"<think>\boxed{4}</think>done", "4", True, "4", "in the thinking, since nothing is said after it"),
    ("math", r"\boxed{1} or \boxed{2}", "1,2", True, "1, 2", "the last 2 boxes, which are joined; equal"),
    ("math", r"\boxed{(1,3)}", "(1,2)", False, "(1,3)", "different (`1` is the same text but for layout; as numbers: "),
    ("math", r"\boxed{(1,2]}", "(1,2)", False, "(1,2]", "a tuple or interval in (], `(1,2]`, where the reference is"),
    ("math", r"\boxed{1,2,3}", "1,2", False, "1,2,3", "3 part(s) where the reference has 2"),
    ("math", r"\boxed{5 cm}", "5 m", False, "5 cm", "the units of `5 cm` and `5 m` contradict each other"),
    ("math", r"\boxed{x+1}", "1+x", True, "x+1", "as expressions: `x+1` and `1+x`"),
    ("math", r"\boxed{C}", "B", False, "C", "the choice is `C`, and the reference's `B`"),
    ("boxed", r"\boxed{42.0}", "42", False, "42.0", "as text: `42.0` and `42`"),
    ("boxed", "The answer is 42", "42", False, None, "no complete box"),
    (
        "deepscaler",
        r"<think>\boxed{3}</think>\boxed{0.5}",
        r"\frac{1}{2}",
        True,
        "0.5",
        "after the last </think>; equal",
    ),
    ("deepscaler", r"</think>\boxed{1}</think>\boxed{2}", "1", False, "2", "by math-verify: `2` and `1`"),
    ("deepscaler", r"\boxed{7}", r"so \boxed{7}", True, "7", "in the whole response, which has no </think>; equal"),
    ("deepscaler", "</think>It is 42.", "42", True, "42", "no box; what math-verify reads after the last </think>"),
    # Where it differs from math: it looks for no statement, and knows no units.
    ("deepscaler", r"\boxed{5\text{ cm}}", "5 m", True, r"5\text{ cm}", "by math-verify"),
    ("deepscaler", "It is not 42", "42", True, "42", "no box; what math-verify reads"),
    ("deepscaler", r"\boxed{" + "(" * 9 + "1" + ")" * 9 + "}", "1", False, "(((((((((1)))))))))", "brackets deep"),
]


@pytest.mark.parametrize(("kind", "text", "reference", "right", "found", "why"), DECISIONS)
def test_a_decision_says_what_was_taken_and_why(
    kind: str, text: str, reference: str, right: bool, found: str | None, why: str
) -> None:
    decision = decide(kind, text, [reference])
    assert (decision.right, decision.found) == (right, found)
    assert why in decision.why


def test_any_reference_counts_and_all_are_named() -> None:
    assert decide("math", r"\boxed{2}", ["1", "2"]) == (True, "2", "the last box; equal (the same text)")
    assert decide("math", r"\boxed{3}", ["1", "2"]).why == (
        "the last box; different (as numbers: `3` and `1`; or as numbers: `3` and `2`)"
    )


ROWS = [
    {"said": r"so \boxed{\frac12}", "truth": "0.5", "right": True},
    {"said": "The answer is 7.", "truth": ["8", "7"], "right": False},
    {"said": "I do not know", "truth": "7", "right": 0},
    {"said": "x", "truth": None, "right": False},
    {"said": "x", "truth": "1", "right": "perhaps"},
]
OPTIONS = ["--response-column", "said", "--answer-column", "truth", "--label-column", "right"]


@pytest.fixture
def file(tmp_path: Path) -> str:
    answers = tmp_path / "answers.jsonl"
    answers.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(answers)


def test_grade_prints_each_answer_and_a_summary(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    app(["grade", file, *OPTIONS], standalone_mode=False)
    assert capsys.readouterr().out.splitlines() == [
        r"1  right  took \frac12  the last box; equal (as numbers: `\frac12` and `0.5`)",
        "2  right (its label says wrong)  took 7.  no box; what 'answer is' states; equal (the same text but for "
        "layout: `7`)",
        "3  wrong  no box, no statement, no mathematics and no number in the last 2000 characters",
        "4  not graded  no reference in truth",
        "5  not graded  no label in right",
        "5 answers by the rule math: 2 right (66.7%), 1 wrong, 2 not graded; agreement with 3 labels 66.67%",
    ]
    app(["grade", file, *OPTIONS, "--differing", "--json"], standalone_mode=False)
    found = json.loads(capsys.readouterr().out)
    assert [row["number"] for row in found["graded"]] == [2]
    assert (found["rule"], found["answers"], found["right"], found["wrong"]) == ("math", 5, 2, 1)
    assert found["agreement"] == pytest.approx(2 / 3)


def test_nfts_rule_looks_at_the_last_characters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = tmp_path / "a.csv"
    answers.write_text(f'response,answer\n"\\boxed{{1}}{"." * 120}",1\n"{"." * 120}\\boxed{{1}}",1\n')
    app(["grade", str(answers), "--rule", "boxed", "--last-characters", "100"], standalone_mode=False)
    first, second, _ = capsys.readouterr().out.splitlines()
    assert first == "1  wrong  no complete box" and second.startswith("2  right  took 1  ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rule", "f1"], "--rule f1: must be one of math, boxed, deepscaler. Fix: choose one of them."),
        ([], "--response-column response: must be among the columns of {file}: said, truth, right. "
         "Fix: set --response-column."),
    ],
)  # fmt: skip
def test_what_cannot_be_graded_is_refused(arguments: list[str], message: str, file: str) -> None:
    with pytest.raises(Refusal) as found:
        app(["grade", file, *arguments], standalone_mode=False)
    assert str(found.value) == message.format(file=file)


def test_grading_a_file_needs_no_torch(file: str) -> None:
    code = (
        "import sys; from megarl.cli import main; sys.argv = ['megarl', 'grade', *sys.argv[1:]]\n"
        "try: main.main()\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "print('heavy:', sorted({'torch', 'megatron', 'vllm', 'datasets', 'transformers'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, file, *OPTIONS]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "heavy: []"
