"""Whole runs of a mixture of experts through the command line: trained with the engine's routing, and continued."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import arithmetic_run
import pytest

TOOLS = Path(__file__).resolve().parents[1] / "tools"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs with a Qwen3-MoE of 4 experts, and a run of 3 steps with its experts on two processes."""
    folder = tmp_path_factory.mktemp("moe")
    arithmetic_run.write_inputs(folder)
    shape = (
        "--family qwen3_moe --experts 4 --experts-per-token 2 --ffn 64 --hidden 64 --layers 2 --heads 2 --kv-heads 1"
    )
    tool = [sys.executable, str(TOOLS / "make_tiny_model.py"), "--out", "experts", "--tokenizer", "tokenizer"]
    subprocess.run([*tool, *shape.split()], cwd=folder, check=True, capture_output=True)
    arithmetic_run.write_run(
        folder,
        steps=3,
        model={"path": "experts"},
        parallel={"processes": 2, "expert": 2},
        moe={"routing_replay": "on", "aux_loss_coefficient": 0.01},
        resume="auto",
        checkpoint={"every": 1, "keep": 3},
    )
    arithmetic_run.finish(arithmetic_run.start(folder, "train", "run.yaml"))
    return folder


def steps_of(folder: Path, name: str) -> list[dict[str, Any]]:
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if "loss" in line]


def test_the_engines_routing_travels_and_is_compared(folder: Path) -> None:
    steps = steps_of(folder, "run")
    assert [line["step"] for line in steps] == [1, 2, 3]
    for line in steps:
        # Engine and policy compute in fp32 alike: a routing that arrived shifted would differ nearly everywhere.
        assert line["routing_differs"] < 0.02
        assert line["logprob_gap_mean"] < 1e-5
        assert 1.0 <= line["expert_load_max"] <= 4.0 and 0.0 <= line["experts_idle"] < 1.0
        assert 0.9 < line["router_aux_loss"] < 4.0


def test_a_run_goes_on_under_another_layout(folder: Path) -> None:
    """From the checkpoint of step 2, in one process and with tensor parallelism: the third step is the same."""
    (expected,) = [line for line in steps_of(folder, "run") if line["step"] == 3]
    source = folder / "runs" / "run" / "checkpoints" / "step_000002"
    for name, changes in (
        ("one", ["parallel.processes=1", "parallel.expert=1"]),
        ("tensor", ["parallel.expert_tensor=1", "parallel.tensor=2", "parallel.sequence=true"]),
    ):
        target = folder / "runs" / name / "checkpoints"
        target.mkdir(parents=True)
        (target / source.name).symlink_to(source)
        (target / "latest").write_text(source.name)
        arithmetic_run.finish(arithmetic_run.start(folder, "train", "run.yaml", f"name={name}", *changes))
        (found,) = steps_of(folder, name)
        assert found["step"] == 3
        assert found["reward_mean"] == pytest.approx(expected["reward_mean"], rel=1e-6)
        assert found["routing_differs"] < 0.02
        assert found["response_length_mean"] == expected["response_length_mean"]
