"""The comparison of two run folders: what counts, what does not, and how the first difference is said."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
compare_runs = importlib.import_module("compare_runs")


def a_run(folder: Path, *, loss: float = 0.1, seconds: float = 1.0, **changes: Any) -> Path:
    """A run of two steps, an evaluation and a checkpoint; `loss` and `changes` are of its second step."""
    lines: list[dict[str, Any]] = [
        {"step": 1, "loss": 0.3, "grad_norm": 1.0, "counters": {}, "seconds": {"update": seconds}},
        {"step": 2, "loss": loss, "grad_norm": 2.0, "counters": {"reused": 1}, "peak_memory_bytes": int(seconds)}
        | changes,
        {"step": 2, "accuracy": 0.5, "seconds": {"evaluate": seconds}},
    ]
    write(folder / "metrics.jsonl", lines)
    write(folder / "samples.jsonl", [{"step": 1, "prompt_index": 4, "response": "7"}])
    write(folder / "evaluations" / "step_000002.jsonl", [{"prompt_index": 0, "response": "8", "reward": 1.0}])
    notes = {"step": 2, "weights": "0a", "moments": {"exp_avg": "0b"}, "model_path": str(folder)}
    write(folder / "checkpoints" / "step_000002" / "progress.json", [notes])
    return folder


def write(file: Path, lines: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def said(capsys: pytest.CaptureFixture[str], first: Path, second: Path, *more: str) -> tuple[int, str]:
    code = compare_runs.main([str(first), str(second), *more])
    found = capsys.readouterr()
    return code, (found.out + found.err).strip()


def test_equal_runs_may_take_other_time_and_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, words = said(capsys, a_run(tmp_path / "a"), a_run(tmp_path / "b", seconds=9.0))
    assert (code, words) == (
        0,
        "the same to the last bit; left out: seconds, time_shares, peak_memory_bytes, memory_bytes, tensor_bytes",
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"loss": 0.10000000000000002},
            "step 2 (metrics.jsonl): loss is 0.1 in the first run and 0.10000000000000002 in the second",
        ),
        ({"grad_norm": 2}, "step 2 (metrics.jsonl): grad_norm is 2.0 in the first run and 2 in the second"),
        (
            {"counters": {"reused": 2}},
            "step 2 (metrics.jsonl): counters.reused is 1 in the first run and 2 in the second",
        ),
        (
            {"counters": {}},
            "step 2 (metrics.jsonl): counters.reused is 1 in the first run and nothing of that name in the second",
        ),
    ],
)
def test_the_first_number_that_differs_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], words: str
) -> None:
    first, second = a_run(tmp_path / "a"), a_run(tmp_path / "b", **changes)
    assert said(capsys, first, second) == (1, words)
    assert said(capsys, first, second, "--steps", "1")[0] == 0
    assert said(capsys, first, second, "--leave-out", *changes)[0] == 0


def test_a_zero_has_its_sign(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, words = said(capsys, a_run(tmp_path / "a", loss=0.0), a_run(tmp_path / "b", loss=-0.0))
    assert (code, words) == (1, "step 2 (metrics.jsonl): loss is 0.0 in the first run and -0.0 in the second")


@pytest.mark.parametrize(
    ("file", "line", "words"),
    [
        (
            "samples.jsonl",
            {"step": 1, "prompt_index": 4, "response": "8"},
            "step 1 (samples.jsonl): response is '7' in the first run and '8' in the second",
        ),
        (
            "evaluations/step_000002.jsonl",
            {"prompt_index": 0, "response": "8", "reward": 0.0},
            "line 1 of evaluations/step_000002.jsonl: reward is 1.0 in the first run and 0.0 in the second",
        ),
        (
            "checkpoints/step_000002/progress.json",
            {"step": 2, "weights": "0a", "moments": {"exp_avg": "0c"}},
            "step 2 (checkpoint): the digest of moments.exp_avg is '0b' in the first run and '0c' in the second",
        ),
    ],
)
def test_samples_answers_and_checkpoints_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, line: dict[str, Any], words: str
) -> None:
    first, second = a_run(tmp_path / "a"), a_run(tmp_path / "b")
    write(second / file, [line])
    assert said(capsys, first, second) == (1, words)


def test_a_shorter_run_differs_in_its_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = a_run(tmp_path / "a"), a_run(tmp_path / "b")
    lines = (second / "metrics.jsonl").read_text().splitlines(keepends=True)
    (second / "metrics.jsonl").write_text("".join(lines[:2]))
    words = "metrics.jsonl: the number of lines is 3 in the first run and 2 in the second"
    assert said(capsys, first, second) == (1, words)


def test_a_checkpoint_of_one_alone_is_no_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = a_run(tmp_path / "a"), a_run(tmp_path / "b")
    (second / "checkpoints" / "step_000002" / "progress.json").unlink()
    assert said(capsys, first, second)[0] == 0


def test_what_is_no_run_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, other = a_run(tmp_path / "a"), tmp_path / "b"
    code, words = said(capsys, run, other)
    assert (code, words) == (2, f"error: {other}/metrics.jsonl is missing, so {other} is no run that can be compared")
    write(other / "metrics.jsonl", [])
    assert said(capsys, run, other)[0] == 2
    (other / "metrics.jsonl").write_text('{"step": 1\n')
    code, words = said(capsys, run, other)
    assert code == 2 and words.startswith(f"error: {other}/metrics.jsonl has text that is no JSON")
