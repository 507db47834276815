"""A run killed in the middle and resumed ends exactly as one that was never interrupted.

Through the command line, over two processes, with vLLM generating, the grader grading and the policy learning.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import arithmetic_run
import numpy as np
import pytest
from parity import read_checkpoint

#: Fields of a step's metrics that say how long it took and how much memory, which no two runs share.
MACHINE = ("seconds", "peak_memory_bytes", "time_shares")

RUN: dict[str, Any] = {
    "resume": "auto",
    "parallel": {"processes": 2, "tensor": 2},
    # The reference stays the model before training, also in a run that continues from later weights.
    "algorithm": {"name": "grpo", "kl_coefficient": 0.02, "dynamic_sampling": True, "max_generation_batches": 2},
    "batch": {"prompts": 6, "tokens_per_microbatch": 192, "updates": 2},
    "optimizer": {"lr": 1e-3, "warmup_steps": 3, "decay": "linear"},
    "checkpoint": {"every": 2, "export_hf": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    arithmetic_run.write_inputs(folder)
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

    output = arithmetic_run.finish(arithmetic_run.start(folder, "train", "run.yaml", "name=broken"))
    assert "continuing after step 2" in " ".join(output.split())

    assert len(lines(whole / "metrics.jsonl")) == 6
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert lines(broken / name) == lines(whole / name)
    expected, found = read_checkpoint(whole / "hf"), read_checkpoint(broken / "hf")
    before = read_checkpoint(folder / "model")
    assert set(found) == set(expected) == set(before)
    for tensor, values in expected.items():
        assert np.array_equal(found[tensor], values), tensor
        assert not np.array_equal(before[tensor], values), tensor
