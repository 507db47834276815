"""An adapter trained alone through the whole system: engine, checkpoints, evaluation, export, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import arithmetic_run
import numpy as np
import pytest
import yaml
from parity import read_checkpoint
from safetensors.numpy import load_file
from test_runs import call, run, steps_of

#: The start's own distribution is a reference, so that steps and continued ones measure under the base alone.
RUN: dict[str, Any] = {
    "parameters": "adapter",
    "adapter": {"rank": 8, "alpha": 16.0},
    "algorithm": {"name": "grpo", "kl_coefficient": 0.01},
    "parallel": {"processes": 2, "tensor": 2},
    "rollout": {"tensor": 2, "group_size": 4, "max_tokens": 12, "kv_cache_gib": 0.02},
    "batch": {"prompts": 8, "tokens_per_microbatch": 256},
    "optimizer": {"lr": 1e-2},
    "evaluation": {"path": "data/heldout.jsonl", "end": True},
    "checkpoint": {"export_hf": True},
}
SCALE = 2.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of three steps, and one that ended after two and went on."""
    folder = tmp_path_factory.mktemp("adapter")
    arithmetic_run.write_inputs(folder)
    arithmetic_run.write_run(folder, **RUN)
    run(folder, "train", "run.yaml", "name=whole", "steps=3")
    run(folder, "train", "run.yaml", "name=parts", "steps=2", "checkpoint.export_hf=false")
    run(folder, "train", "run.yaml", "name=parts", "steps=3", "resume=auto")
    return folder


def adapter(folder: Path, name: str) -> dict[str, np.ndarray]:
    return load_file(folder / "runs" / name / "adapter" / "adapter_model.safetensors")


def test_a_continued_run_ends_where_an_uninterrupted_one_does(folder: Path) -> None:
    assert len(steps_of(folder, "whole")) == 3
    assert steps_of(folder, "whole")[:2] == steps_of(folder, "parts")[:2]
    assert steps_of(folder, "whole")[2] == steps_of(folder, "parts")[2]
    whole, parts = adapter(folder, "whole"), adapter(folder, "parts")
    assert whole.keys() == parts.keys()
    assert all(np.array_equal(whole[name], parts[name]) for name in whole)


def test_the_engine_generates_with_the_adapter(folder: Path) -> None:
    """From the second step on it differs from the base, and policy and engine agree all the same."""
    for number, step in enumerate(steps_of(folder, "whole")):
        assert step["logprob_gap_max"] < 1e-4
        assert step["grad_norm"] > 0
        assert (step["reference_kl"] > 1e-6) == (number > 0)


def test_the_export_is_the_base_with_the_adapter_merged(folder: Path) -> None:
    base, merged = read_checkpoint(folder / "model"), read_checkpoint(folder / "runs" / "whole" / "hf")
    factors = adapter(folder, "whole")
    assert merged.keys() == base.keys()
    for name, value in merged.items():
        a = factors.get(f"base_model.model.{name.removesuffix('weight')}lora_A.weight")
        if a is None:
            assert np.array_equal(value, base[name]), name
        else:
            b = factors[f"base_model.model.{name.removesuffix('weight')}lora_B.weight"]
            assert np.abs(b).max() > 1e-3
            np.testing.assert_allclose(value, base[name] + SCALE * (b @ a), rtol=0, atol=1e-6, err_msg=name)


def test_a_checkpoint_is_small_and_evaluates_as_its_run_did(folder: Path) -> None:
    checkpoint = folder / "runs" / "whole" / "checkpoints" / "step_000003"
    size = sum(one.size for one in adapter(folder, "whole").values())
    stored = sum(file.stat().st_size for file in checkpoint.iterdir())
    # fp32 weights and, of the optimizer's, weights and two moments; each tensor with its notes.
    assert stored < 4 * 4 * size + 400_000
    summary = json.loads((folder / "runs/whole/summary.json").read_text())
    printed = json.loads(run(folder, "evaluate", "run.yaml", "checkpoint=runs/whole", "--json"))
    assert printed["accuracy"] == summary["accuracy_after"]
    answers = (folder / printed["answers"]).read_bytes()
    assert answers == (folder / "runs/whole/evaluations/step_000003.jsonl").read_bytes()


def test_a_run_begins_from_an_adapter(folder: Path) -> None:
    run(
        folder, "train", "run.yaml", "name=further", "steps=1", "adapter.path=runs/whole/adapter",
        "evaluation.start=true", "evaluation.end=false", "checkpoint.end=false", "checkpoint.export_hf=false",
    )  # fmt: skip
    ended = (folder / "runs/whole/evaluations/step_000003.jsonl").read_bytes()
    assert (folder / "runs/further/evaluations/step_000000.jsonl").read_bytes() == ended
    # What it began with is the reference: at first nothing differs from it.
    (step,) = steps_of(folder, "further")
    assert abs(step["reference_kl"]) < 1e-6


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("adapter.rank=4", "adapter.rank=4: differs from 8, with which"),
        ("adapter.alpha=8", "adapter.alpha=8: differs from 16, with which"),
        ("adapter.targets=[q_proj]", "adapter.targets=q_proj: differs from all-linear, with which"),
        ("parameters=policy", "adapter.rank=8: has no effect with parameters=policy."),
    ],
)
def test_a_run_does_not_go_on_with_another_adapter(folder: Path, override: str, said: str) -> None:
    for command in ("check", "train"):
        code, _, errors = call(folder, command, "run.yaml", "name=whole", "steps=4", "resume=auto", override)
        assert code == 2 and "Traceback" not in errors
        assert errors.splitlines()[-1].startswith(f"megarl: {said}")


def test_an_adapters_checkpoint_is_no_start_for_all_weights_nor_for_two_adapters(folder: Path) -> None:
    plain = yaml.safe_load((folder / "run.yaml").read_text())
    del plain["parameters"], plain["adapter"]
    (folder / "plain.yaml").write_text(yaml.safe_dump(plain))
    for file, override, said in (
        (
            "plain.yaml",
            (),
            "parameters=policy: needs all weights, and runs/whole/checkpoints/step_000003 holds an adapter",
        ),
        (
            "run.yaml",
            ("adapter.path=runs/whole/adapter",),
            "adapter.path=runs/whole/adapter: contradicts model.weights",
        ),
    ):
        code, _, errors = call(folder, "check", file, "name=new", "model.weights=runs/whole", *override)
        assert code == 2
        assert errors.splitlines()[-1].startswith(f"megarl: {said}")
