"""BRIDGE through the whole system: engine, demonstrations, checkpoints of all sets, resume, evaluation and export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import arithmetic_run
import numpy as np
import pytest
import torch
from parity import read_checkpoint
from test_resume import lines
from test_runs import call, run

from megarl.config.model_shape import read_model_shape
from megarl.conversion import to_hf
from megarl.conversion.parameters import ParameterReader
from megarl.conversion.ranks import Ranks
from megarl.formats.megatron import DistributedCheckpoint

RUN: dict[str, Any] = {
    "resume": "auto",
    "parallel": {"processes": 2, "tensor": 2},
    "algorithm": {"name": "bridge", "kl_coefficient": 0.01, "adapter_lr": 3e-3},
    "adapter": {"rank": 4, "alpha": 8.0},
    "data": {
        "path": "data/train.jsonl",
        "answer_column": "answer",
        "max_prompt_tokens": 32,
        # Of those shown some are too long.
        "demonstrations": {"path": "data/shown.jsonl", "max_tokens": 40},
    },
    "rollout": {"tensor": 2, "group_size": 4, "max_tokens": 16, "kv_cache_gib": 0.02},
    "batch": {"prompts": 6, "demonstrations": 5, "tokens_per_microbatch": 256, "updates": 2},
    "optimizer": {"lr": 1e-3, "warmup_steps": 3, "decay": "linear", "weight_decay": 0.01},
    "evaluation": {"path": "data/heldout.jsonl", "end": True},
    "checkpoint": {"every": 2, "export_hf": True},
}
STEPS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a whole run, and one that was killed after its third step and went on."""
    folder = tmp_path_factory.mktemp("bridge")
    arithmetic_run.write_inputs(folder)
    rows = [json.loads(line) for line in (folder / "data" / "train.jsonl").read_text().splitlines()]
    shown = [
        {"prompt": one["prompt"], "solution": one["solution"] * (1 + (n % 4 == 3) * 9)}
        for n, one in enumerate(rows[:12])
    ]
    (folder / "data" / "shown.jsonl").write_text("".join(json.dumps(one) + "\n" for one in shown))
    arithmetic_run.write_run(folder, **RUN)
    run(folder, "train", "run.yaml", "name=whole", f"steps={STEPS}")
    process = arithmetic_run.start(folder, "train", "run.yaml", "name=broken", f"steps={STEPS}")
    metrics = folder / "runs" / "broken" / "metrics.jsonl"
    arithmetic_run.kill_when(process, lambda: len(lines(metrics)) == 3)
    shutil.copytree(folder / "runs" / "broken", folder / "runs" / "pipelined")
    run(folder, "train", "run.yaml", "name=broken", f"steps={STEPS}")
    return folder


def steps_of(folder: Path, name: str) -> list[dict[str, Any]]:
    return [line for line in lines(folder / "runs" / name / "metrics.jsonl") if "loss" in line]


def test_a_killed_run_ends_where_an_uninterrupted_one_does(folder: Path) -> None:
    whole, broken = steps_of(folder, "whole"), steps_of(folder, "broken")
    assert len(whole) == STEPS and whole == broken
    notes = [
        json.loads((folder / f"runs/{name}/checkpoints/step_00000{STEPS}/progress.json").read_text())
        for name in ("whole", "broken")
    ]
    assert notes[0]["sets"].keys() == {"adapter", "shadow"}
    for key in ("sets", "weights", "moments", "states", "beside", "data.demonstrations"):
        assert notes[0][key] == notes[1][key], key
    # As many as were learned, and those that were passed over.
    long = sum(step["counters"].get("demonstrations_too_long", 0) for step in whole)
    assert notes[0]["states"]["demonstrations"] == 5 * STEPS + long and long > 2
    first, second = (read_checkpoint(folder / "runs" / name / "hf") for name in ("whole", "broken"))
    assert all(np.array_equal(first[name], value) for name, value in second.items())


def test_every_step_says_what_each_set_and_pass_did(folder: Path) -> None:
    for step in steps_of(folder, "whole"):
        # The engine generated with the adapter merged.
        assert step["logprob_gap_max"] < 1e-4
        assert step["sft_loss"] == step["sft/loss"] > 0
        assert step["cooperative_gain"] == pytest.approx(step["shadow/loss"] - step["loss"], abs=1e-12)
        for name in ("grad_norm", "adapter/grad_norm", "shadow/grad_norm", "grad_norm_policy", "grad_norm_adapter"):
            assert step[name] > 0
        for name in ("sft/grad_norm_policy", "sft/grad_norm_adapter", "shadow/grad_norm_shadow"):
            assert step[name] > 0
        assert step["adapter/lr"] == pytest.approx(3 * step["lr"]) and step["shadow/lr"] == step["lr"]
    assert steps_of(folder, "whole")[-1]["cooperative_gain"] != 0


def test_a_run_resumes_under_another_layout(folder: Path) -> None:
    run(folder, "train", "run.yaml", "name=pipelined", f"steps={STEPS}", "parallel.tensor=1", "parallel.pipeline=2")
    expected = steps_of(folder, "whole")
    found = steps_of(folder, "pipelined")
    assert [step["step"] for step in found] == [1, 2, 3, 4]
    for mine, other in zip(found[2:], expected[2:], strict=True):
        for name in ("loss", "sft_loss", "grad_norm", "adapter/grad_norm", "shadow/grad_norm"):
            assert mine[name] == pytest.approx(other[name], rel=1e-5, abs=1e-7), name
        assert mine["cooperative_gain"] == pytest.approx(other["cooperative_gain"], abs=1e-6)


def test_a_checkpoint_is_evaluated_with_its_adapter(folder: Path) -> None:
    printed = json.loads(run(folder, "evaluate", "run.yaml", "checkpoint=runs/whole", "--json"))
    answers = (folder / printed["answers"]).read_bytes()
    assert answers == (folder / f"runs/whole/evaluations/step_00000{STEPS}.jsonl").read_bytes()
    assert not (folder / "runs/whole/adapter").exists()


def test_a_checkpoint_is_converted_with_its_adapter(folder: Path) -> None:
    to_hf.convert(folder / "runs" / "whole", folder / "converted", Ranks(), hf_config=folder / "model")
    found, wanted = (read_checkpoint(folder / one) for one in ("converted", "runs/whole/hf"))
    assert found.keys() == wanted.keys()
    assert all(np.abs(found[name] - value).max() < 1e-6 for name, value in wanted.items())
    base = to_hf.open_weights(folder / f"runs/whole/checkpoints/step_00000{STEPS}", folder / "model")
    plain = ParameterReader(DistributedCheckpoint(base.path), read_model_shape(folder / "model"))
    changed = [one for one in base.parameters if not torch.equal(plain.read(one)[:1], next(base.regions(one))[1][:1])]
    # All linear layers, and nothing else.
    assert len(changed) == 2 * 4


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("adapter.rank=8", "adapter.rank=8: differs from 4, with which"),
        ("adapter.targets=[q_proj]", "adapter.targets=q_proj: differs from all-linear, with which"),
        ("algorithm.rl_weight=0.6", "algorithm.rl_weight=0.6 with resume=auto: differs from 0.5, with which"),
        (
            "algorithm.rl_weight_schedule=linear",
            "algorithm.rl_weight_schedule=linear with resume=auto: differs from constant, with which",
        ),
    ],
)
def test_a_run_does_not_go_on_as_another(folder: Path, override: str, said: str) -> None:
    for command in ("check", "train"):
        code, _, errors = call(folder, command, "run.yaml", "name=whole", f"steps={STEPS}", override)
        assert code == 2 and "Traceback" not in errors
        assert errors.splitlines()[-1].startswith(f"megarl: {said}")


def test_a_run_does_not_go_on_with_other_demonstrations(folder: Path) -> None:
    file = folder / "data" / "shown.jsonl"
    before = file.read_text()
    try:
        file.write_text(before.replace("+", "-"))
        code, _, errors = call(folder, "train", "run.yaml", "name=whole", "steps=6")
    finally:
        file.write_text(before)
    assert code == 2
    said = "megarl: data.demonstrations of 12 prompts with resume=auto: has other rows than those that "
    assert errors.splitlines()[-1].startswith(said)


def test_a_checkpoint_of_both_is_nothing_for_a_run_without_an_adapter(folder: Path) -> None:
    plain = ("algorithm=grpo", "adapter={}", "data.demonstrations=null", "batch.demonstrations=null")
    code, _, errors = call(folder, "check", "run.yaml", "name=new", "model.weights=runs/whole", *plain)
    assert code == 2
    assert errors.splitlines()[-1].startswith(
        "megarl: runs/whole/checkpoints/step_000004: holds a base and an adapter that are one policy together, and "
        "this run has no adapter. Fix: "
    )
