"""What needs the packages of the GPU lock and no GPU, run by its Python, which MEGARL_GPU_PYTHON names.

MEGARL_LOCK=gpu bash launch/setup.sh    # in a checkout of its own
MEGARL_GPU_PYTHON=CHECKOUT/.venv/bin/python python -m pytest tests/test_gpu_lock.py
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FILES = (
    "test_vendor_calls.py",
    "test_transformer_engine_layers.py",
    "test_transformer_engine_scaling.py",
    "test_installation.py",
)
PYTHON = os.environ.get("MEGARL_GPU_PYTHON")


@pytest.mark.skipif(
    PYTHON is None, reason="needs an environment of requirements/gpu.lock: set MEGARL_GPU_PYTHON to its Python"
)
@pytest.mark.parametrize("file", FILES)
def test_passes_with_the_packages_of_the_gpu_lock(file: str) -> None:
    assert PYTHON is not None
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join((str(TESTS.parent), str(TESTS))),
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rs", file]
    done = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
