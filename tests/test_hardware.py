"""What this machine's GPUs do not allow, or the CPU: refused before a rank starts."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from config_case import DENSE, config_with, write_case
from test_cli import CLEAN, megarl
from test_plan_cli import CLUSTER

from megarl.train import hardware

ON_CPU = "megarl: fp8.param=true with precision=fp8-tensorwise on the CPU: is not possible: "
PARAM = ("precision=fp8-tensorwise", "fp8.param=true", "logging.tensorboard=false")


@pytest.fixture
def case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a run of a model that fits FP8; the working directory is it."""
    monkeypatch.chdir(tmp_path)
    write_case(tmp_path)
    (tmp_path / "model" / "config.json").write_text(json.dumps(DENSE))
    return tmp_path


def with_gpus(monkeypatch: pytest.MonkeyPatch, *capabilities: tuple[int, int]) -> None:
    """As on a machine with GPUs of these compute capabilities, where CUDA starts as the first is looked at."""

    def capability(number: int) -> tuple[int, int]:
        assert os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1"
        return capabilities[number]

    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_run_is_refused_for_the_cpu_before_a_rank_starts(case: Path) -> None:
    ended = megarl(case, "train", "run.yaml", *PARAM, "parallel.processes=2")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith(ON_CPU) and ended.stderr.count("\n") == 1
    assert not (case / "runs").exists()
    assert megarl(case, "check", "run.yaml", *PARAM, "--cluster", "h100").returncode == 0


def test_a_run_is_checked_for_another_machines_gpus(case: Path) -> None:
    (case / "ampere.yaml").write_text(yaml.safe_dump(CLUSTER | {"compute_capability": "8.0"}))
    ended = megarl(case, "check", "run.yaml", *PARAM, "--cluster", "ampere.yaml")
    assert (ended.returncode, ended.stderr) == (
        2,
        "megarl: precision=fp8-tensorwise: needs GPUs of compute capability 8.9 or more, not 8.0. "
        "Fix: set precision=bf16.\n",
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_nvidias_driver_a_check_does_without_torch(case: Path) -> None:
    code = (
        "import sys\nsys.argv = 'megarl check run.yaml'.split()\nfrom megarl.cli.main import app\n"
        "try:\n    app()\nexcept SystemExit:\n    pass\nassert 'torch' not in sys.modules"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=case, env=CLEAN, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_each_gpu_is_looked_at_once_cuda_may_start(case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, (9, 0), (8, 0), (9, 0))
    assert hardware.gpu_capabilities() == {(8, 0), (9, 0)}
    refused = [one.value for one in hardware.refusals(config_with(deterministic=True))]
    assert refused == ["deterministic=true on a GPU of compute capability 8.0"]


def test_a_gpus_libraries_are_looked_at(case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, (9, 0))
    monkeypatch.setenv("NVTE_FP8_BLOCK_SCALING_FP32_SCALES", "1")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr("megarl.health.facts.installed", lambda *names: "2.2.0")
    rules = [one.rule for one in hardware.refusals(config_with(precision="fp8-blockwise"))]
    assert rules == [
        "needs Transformer Engine 2.3 or later, and 2.2.0 is installed",
        "needs CUDA 12.9 or later, and torch was built with 12.8",
        "must not be 1 with precision=fp8-blockwise, whose scales are powers of two",
    ]
