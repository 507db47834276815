"""The policy of Transformer Engine's layers beside the CPU's: log-probs, loss and gradient norm of an update.

The bars are the precision's own error: what the CPU's layers lose by it against fp32.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import gpu_numbers
import numpy as np
import parity
import pytest

TESTS = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, sizes in gpu_numbers.MODELS.items():
        parity.write_model(folder, name, **sizes)
    return folder


@pytest.fixture(scope="module")
def on_the_cpu(models: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """What the CPU's layers compute, in a process that sees no GPU."""
    out = models / "cpu.pickle"
    paths = os.pathsep.join(map(str, (TESTS.parent, TESTS, TESTS / "gpu")))
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": paths, "OMP_NUM_THREADS": "8"}
    subprocess.run([sys.executable, gpu_numbers.__file__, models, out], env=environment, check=True)
    return pickle.loads(out.read_bytes())


def apart(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).mean())


@pytest.mark.parametrize("precision", gpu_numbers.PRECISIONS)
@pytest.mark.parametrize("name", gpu_numbers.MODELS)
def test_an_update_is_the_cpus(name: str, precision: str, models: Path, on_the_cpu: Any, world: Any, figure) -> None:
    found = gpu_numbers.numbers(models / name, precision, world)
    cpu, exact = on_the_cpu[name, precision], on_the_cpu[name, "fp32"]
    # Two roundings of the same numbers; in FP8 the quantised numbers are the same ones.
    most = 2.0 if precision == "bf16" else 1.0
    for when in ("before", "after"):
        cost = apart(cpu[when], exact[when])
        part = apart(found[when], cpu[when]) / cost
        figure(f"{name} {precision}: log-probs {when} the update, part of its error", part, "", f"< {most}")
        assert part < most, f"{when}: {part:.2f} of {cost:.2e} nats"
    assert found["loss"] == pytest.approx(cpu["loss"], rel=0.05, abs=1e-3)
    assert found["grad_norm"] == pytest.approx(cpu["grad_norm"], rel=0.05)


@pytest.mark.parametrize("precision", ["bf16", "fp8-blockwise"])
@pytest.mark.parametrize("name", gpu_numbers.MODELS)
def test_passes_before_a_step_add_up(name: str, precision: str, models: Path, world: Any) -> None:
    """A layer that adds its weight's gradient to the buffer itself must find what an earlier pass has left there."""
    config = gpu_numbers.config_of(models / name, precision)
    with parity.policy_of(config, world) as policy:
        sums = gpu_numbers.gradients_of_passes(policy, config, [(0,), (1,), (0, 1)])
    for parameter, (first, second, both) in sums.items():
        apart = float((both - first - second).norm())
        # Attention's backward pass on a GPU adds up in no fixed order.
        assert apart <= 0.01 * float(both.norm()) + 1e-6, f"{parameter}: {apart:.2e} of {float(both.norm()):.2e}"
        assert float(first.norm()) > 0.0 or "expert" in parameter, parameter
