"""A run killed in the middle and resumed ends exactly as one that was never interrupted.

Through the command line, over four processes, with vLLM generating, the grader grading and the policy learning.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import arithmetic_run
import numpy as np
import pytest
from parity import read_checkpoint

#: Fields of a step's metrics that say how long it took and how much memory, which no two runs share.
MACHINE = ("seconds", "peak_memory_bytes", "memory_bytes", "time_shares")

RUN: dict[str, Any] = {
    "resume": "auto",
    "parallel": {"processes": 4, "tensor": 2},
    # One that uses all that an algorithm may, a state of its own among it. Its reference stays the model before
    # training, also in a run that continues from later weights.
    "algorithm": {"name": "outside:Outside", "share": 0.7},
    "batch": {"prompts": 6, "tokens_per_microbatch": 192, "updates": 2},
    "optimizer": {"lr": 1e-3, "warmup_steps": 3, "decay": "linear"},
    "checkpoint": {"every": 2, "export_hf": True},
    # Drawn not as often as they have rows: one is in its second epoch while the other is in its first.
    "data": {
        "sources": [
            {"path": "data/many.jsonl", "name": "many", "weight": 1.0},
            {"path": "data/few.jsonl", "name": "few", "weight": 2.0},
        ],
        "answer_column": "answer",
        "max_prompt_tokens": 32,
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    arithmetic_run.write_inputs(folder)
    rows = (folder / "data" / "train.jsonl").read_text().splitlines(keepends=True)
    (folder / "data" / "many.jsonl").write_text("".join(rows[:36]))
    (folder / "data" / "few.jsonl").write_text("".join(rows[36:]))
    shutil.copy(Path(__file__).parent / "outside_algorithm.py", folder / "outside.py")
    arithmetic_run.write_run(folder, **RUN)
    return folder


def lines(file: Path) -> list[dict[str, Any]]:
    """The records of a .jsonl file, without what depends on the machine; a line being written is left out."""
    text = file.read_text() if file.is_file() else ""
    records = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [{key: value for key, value in record.items() if key not in MACHINE} for record in records]


def test_killed_and_resumed_is_the_same_as_never_interrupted(folder: Path):
    whole, broken = folder / "runs" / "whole", folder / "runs" / "broken"
    arithmetic_run.finish(arithmetic_run.start(folder, "train", "run.yaml", "name=whole"))

    # In the middle of step 4: step 3 is recorded, and step 4 takes longer than the wait.
    process = arithmetic_run.start(folder, "train", "run.yaml", "name=broken")
    metrics = broken / "metrics.jsonl"
    arithmetic_run.kill_when(process, lambda: len(lines(metrics)) == 3 and time.sleep(0.05) is None)
    assert (broken / "checkpoints" / "latest").read_text() == "step_000002"
    assert [line["step"] for line in lines(metrics)] == [1, 2, 3]
    assert not (broken / "summary.json").exists()

    # While step 4 is being saved: its folder has a name that is not final.
    process = arithmetic_run.start(folder, "train", "run.yaml", "name=broken")
    saving = broken / "checkpoints" / "step_000004.partial"
    arithmetic_run.kill_when(process, saving.is_dir)
    assert (broken / "checkpoints" / "latest").read_text() == "step_000002"

    # A setting that this run makes nothing of.
    process = arithmetic_run.start(folder, "train", "run.yaml", "name=broken", "evaluation.rows=5")
    said = " ".join(arithmetic_run.finish(process).split())
    assert "continuing after step 2" in said
    assert "continues step_000002 with other settings: evaluation.rows=5 (was null)" in said
    kept = [file.name for file in sorted(broken.glob("config*.yaml"))]
    assert kept == ["config.until_step_000002.yaml", "config.yaml"]
    refused = arithmetic_run.start(folder, "train", "run.yaml", "name=broken", "seed=4", "evaluation.rows=5")
    assert "seed=4 with resume=auto: differs from 3, with which" in " ".join(
        refused.communicate(timeout=300)[0].split()
    )
    assert refused.returncode == 2
    # 6 prompts x 4 answers, in a step that dropped groups as many again, and at most one text of the algorithm's own
    # for each prompt; those of step 4 were not all made.
    made = {int(step): int(count) for step, count in re.findall(r"step (\d): (\d+) completions were made before", said)}
    assert made.keys() == {3, 4} and made[3] in (*range(24, 31), *range(48, 61)) and made[4] > 0
    assert list((broken / "unfinished").iterdir()) == []
    notes = [json.loads((run / "checkpoints/step_000006/progress.json").read_text()) for run in (whole, broken)]
    assert notes[0]["sets"].keys() == {"namer"} and notes[0]["sets"] == notes[1]["sets"]
    states = [note["states"] for note in notes]
    assert states[0] == states[1] and states[0]["algorithm"]["steps"] == 6 and states[0]["stream"] >= 36

    steps = lines(whole / "metrics.jsonl")
    assert len(steps) == 6 and all("away_from_start" in step for step in steps)
    assert sum(step["counters"].get("names", 0) for step in steps) > 6 and any("naming_loss" in step for step in steps)
    assert any(step["namer/naming_loss"] not in (None, step["naming_loss"]) for step in steps if "naming_loss" in step)
    assert all(step["naming_nll"] > 0 for step in steps[::2]) and all("naming_nll" not in step for step in steps[1::2])
    counts = [line["answers_by_source"] for line in lines(whole / "metrics.jsonl")]
    many, few = (sum(count[name] for count in counts) // 4 for name in ("many", "few"))
    # The step goes on behind a kill in the midst of an epoch of each.
    assert abs(few - 2 * many) <= 2 and many < 36 and few > 12
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert lines(broken / name) == lines(whole / name)
    expected, found = read_checkpoint(whole / "hf"), read_checkpoint(broken / "hf")
    before = read_checkpoint(folder / "model")
    assert set(found) == set(expected) == set(before)
    for tensor, values in expected.items():
        assert np.array_equal(found[tensor], values), tensor
        assert not np.array_equal(before[tensor], values), tensor


def test_a_run_resumes_under_another_layout(folder: Path):
    """TP 2 to PP 2, TP 2 to DP 2, DP 2 to 1: the losses are those of the run that went on as it was, to 1e-5."""
    whole = folder / "runs" / "whole"
    if not (whole / "summary.json").exists():
        arithmetic_run.finish(arithmetic_run.start(folder, "train", "run.yaml", "name=whole"))
    expected = {line["step"]: line for line in lines(whole / "metrics.jsonl")}
    ways = {
        "pipelined": [(6, ("parallel.tensor=1", "parallel.pipeline=2"))],
        "single": [
            (5, ("parallel.tensor=1",)),
            (6, ("parallel.tensor=1", "parallel.processes=1", "rollout.tensor=1")),
        ],
    }
    for name, legs in ways.items():
        run = folder / "runs" / name
        shutil.copytree(whole, run)
        shutil.rmtree(run / "checkpoints" / "step_000006")
        (run / "checkpoints" / "latest").write_text("step_000004")
        for last, layout in legs:
            # The whole run's 6 steps stay those that the learning rate decays over.
            stop = () if last == 6 else (f"checkpoint.every={last}",)
            process = arithmetic_run.start(folder, "train", "run.yaml", f"name={name}", *layout, *stop)
            if last == 6:
                arithmetic_run.finish(process)
                continue
            saved = run / "checkpoints" / f"step_{last:06d}"
            arithmetic_run.kill_when(process, saved.is_dir)
        found = {line["step"]: line for line in lines(run / "metrics.jsonl")}
        for step in (5, 6):
            for number in ("loss", "grad_norm", "reward_mean"):
                assert found[step][number] == pytest.approx(expected[step][number], rel=1e-5, abs=1e-7), (name, step)
