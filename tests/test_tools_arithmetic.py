"""The arithmetic generator: right answers, the format, shares, disjointness, repeatability."""

import importlib
import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megarl.rewards.math import boxed_equals

TOOLS = Path(__file__).resolve().parents[1] / "tools"
sys.path.insert(0, str(TOOLS))

make_arithmetic = importlib.import_module("make_arithmetic")


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("level", sorted(make_arithmetic.LEVELS))
def test_every_step_and_answer_is_right_and_in_range(level: int) -> None:
    source = random.Random(level)
    for _ in range(300):
        row = make_arithmetic.draw_problem(level, source).row(boxed=True)
        question, solution = str(row["prompt"]), str(row["solution"])
        assert re.fullmatch(r"\d+([+-]\d+)+=", question)
        assert str(eval(question[:-1])) == row["answer"]
        thinking, answer = re.fullmatch(r"(?s)<think>(.*)</think>(.*)", solution).groups()  # type: ignore[union-attr]
        steps = thinking.split("\n\n")
        assert len(steps) == level
        for step in steps:
            left, right = step.split("=")
            assert eval(left) == int(right)
            assert 0 <= int(right) <= make_arithmetic.MAX_VALUE
        assert answer == rf"\boxed{{{row['answer']}}}"
        assert boxed_equals(solution, str(row["answer"]))


def test_files_have_the_asked_shares_and_share_no_problem(tmp_path: Path) -> None:
    out = tmp_path / "data"
    assert (
        make_arithmetic.main(["--out", str(out), "--train", "1000", "--heldout", "100", "--levels", "1", "3", "4"]) == 0
    )
    train, heldout = read(out / "train.jsonl"), read(out / "heldout.jsonl")
    assert (len(train), len(heldout)) == (1000, 100)
    prompts = [row["prompt"] for row in train + heldout]
    assert len(set(prompts)) == len(prompts)
    right = [boxed_equals(row["solution"], row["answer"]) for row in train]
    assert sum(right) == 300
    plain = [row for row, boxed in zip(train, right, strict=True) if not boxed]
    assert all(row["solution"].endswith(f"</think>Answer: {row['answer']}") for row in plain)
    # The ending says nothing about the problem: every level has about the same share of each.
    for level in (1, 3, 4):
        of_level = [boxed for row, boxed in zip(train, right, strict=True) if row["level"] == level]
        assert len(of_level) in (333, 334)
        assert 0.2 < sum(of_level) / len(of_level) < 0.4
    assert all(boxed_equals(row["solution"], row["answer"]) for row in heldout)
    assert {row["data_source"] for row in train + heldout} == {"arithmetic"}


def test_the_seed_decides_everything(tmp_path: Path) -> None:
    texts = []
    for name, seed in (("a", "5"), ("b", "5"), ("c", "6")):
        make_arithmetic.main(["--out", str(tmp_path / name), "--train", "50", "--heldout", "10", "--seed", seed])
        texts.append((tmp_path / name / "train.jsonl").read_text() + (tmp_path / name / "heldout.jsonl").read_text())
    assert texts[0] == texts[1] != texts[2]


def test_a_level_that_is_used_up_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Level 1 has fewer than 10,000 different problems.
    assert make_arithmetic.main(["--out", str(tmp_path), "--train", "11000", "--levels", "1"]) == 2
    assert "level 1 has too few different problems" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_wrong_arguments_exit_with_two(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--mixed-share", "1.5"], ["--train", "0"], ["--levels", "9"]):
        with pytest.raises(SystemExit) as ended:
            make_arithmetic.main(["--out", "unused", *arguments])
        assert ended.value.code == 2
    assert "must lie in 0..1" in capsys.readouterr().err


@pytest.mark.parametrize("tool", ["make_arithmetic", "train_tokenizer", "make_tiny_model"])
def test_help_shows_examples_and_imports_nothing_heavy(tool: str) -> None:
    program = (
        f"import sys; sys.path.insert(0, {str(TOOLS)!r}); import {tool}\n"
        f"try: {tool}.main(['--help'])\n"
        "except SystemExit: print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    text = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert f"python tools/{tool}.py --" in text
    assert text.endswith("[]\n")
