"""`deterministic: true`: what contradicts it, what it sets, and what it implies of other settings."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from config_case import config_with

from megarl.config import determinism
from megarl.config.determinism import VARIABLES
from megarl.config.schema import RunConfig
from megarl.parallel import cpu_platform
from megarl.policy.determinism import deterministic_algorithms
from megarl.train import generation, rollouts
from megarl.train.inference import Inference

MEMORY: Any = torch.utils.deterministic


@pytest.mark.parametrize(
    ("rollout", "environment", "messages"),
    [
        ({}, {}, []),
        ({"assignment": "fixed", "seeded": True}, {"CUBLAS_WORKSPACE_CONFIG": ":16:8", "NCCL_ALGO": "Ring"}, []),
        (
            {"assignment": "drawn"},
            {},
            [
                "rollout.assignment=drawn with deterministic=true: would let which replica answers a prompt depend on "
                "the replicas' speed. Fix: remove one of the two."
            ],
        ),
        (
            {"seeded": False},
            {},
            [
                "rollout.seeded=false with deterministic=true: would let a sample depend on those that are drawn "
                "beside it. Fix: remove one of the two."
            ],
        ),
        (
            {"environment": {"kind": "retry"}},
            {},
            [
                "rollout.environment.in_order=false with deterministic=true: lets the engine's work depend on when "
                "replies come. Fix: set rollout.environment.in_order=true, or deterministic=false."
            ],
        ),
        ({"environment": {"kind": "retry", "in_order": True}}, {}, []),
        (
            {},
            {"CUBLAS_WORKSPACE_CONFIG": ":0:0", "NCCL_ALGO": "Tree"},
            [
                "CUBLAS_WORKSPACE_CONFIG=:0:0 in the environment with deterministic=true: must be :4096:8 or :16:8. "
                "Fix: unset it, or set deterministic=false.",
                "NCCL_ALGO=Tree in the environment with deterministic=true: must be Ring. "
                "Fix: unset it, or set deterministic=false.",
            ],
        ),
    ],
)
def test_what_contradicts_it_is_refused(
    rollout: dict[str, Any], environment: dict[str, str], messages: list[str]
) -> None:
    config = config_with(rollout=rollout, deterministic=True)
    assert [str(one) for one in determinism.refusals(config, environment)] == messages
    assert list(determinism.refusals(config_with(rollout=rollout, deterministic=False), environment)) == []


def test_libraries_are_told_before_they_start(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    determinism.set_variables(config_with(deterministic=False))
    assert "NCCL_ALGO" not in os.environ
    determinism.set_variables(config_with(deterministic=True))
    found = {name: os.environ.pop(name) for name in VARIABLES}
    assert found == {
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
        "CUBLAS_WORKSPACE_CONFIG": ":16:8",
        "NCCL_ALGO": "Ring",
    }


def test_pytorchs_algorithms_are_chosen_for_the_block_alone() -> None:
    filled = MEMORY.fill_uninitialized_memory
    with deterministic_algorithms(False):
        assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(ZeroDivisionError), deterministic_algorithms(True):
        assert (
            torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
        )
        assert not MEMORY.fill_uninitialized_memory
        raise ZeroDivisionError
    assert not torch.are_deterministic_algorithms_enabled()
    assert MEMORY.fill_uninitialized_memory == filled


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("deterministic", [False, True])
def test_what_a_run_that_repeats_implies(gpu: bool, deterministic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fixed work and seeds as on the CPU; on a GPU nothing is kept of a step that is made again."""
    for module in (cpu_platform, rollouts):
        monkeypatch.setattr(module, "has_cuda", lambda: gpu)
    monkeypatch.setattr("megarl.policy.determinism.has_cuda", lambda: gpu)
    config = config_with(deterministic=deterministic)
    engine = SimpleNamespace(fixed_assignment=lambda total: "fixed", shared_counter=lambda total: "drawn")
    monkeypatch.setattr("megarl.train.inference.Push", lambda policy, engine: None)

    def assigned(config: RunConfig) -> str:
        inference: Any = Inference(SimpleNamespace(config=config), engine, None, None, None)  # type: ignore[arg-type]
        return inference.work(4)

    repeats = deterministic or not gpu
    assert assigned(config) == ("fixed" if repeats else "drawn")
    assert generation.is_seeded(config, "policy") == repeats
    assert rollouts._keeps_unfinished(config) == (not (deterministic and gpu))
    # What is asked for is done.
    asked = {"assignment": "drawn", "seeded": not repeats, "keep_unfinished": deterministic and gpu}
    other = config_with(deterministic=deterministic, rollout=asked)
    assert assigned(other) == "drawn"
    assert generation.is_seeded(other, "policy") != repeats
    assert rollouts._keeps_unfinished(other) == (deterministic and gpu)
