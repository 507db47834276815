"""What stands in for CUDA leaves the rest of PyTorch as it is."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

DEVICES = """
import torch
from megarl.parallel import cpu_platform

cpu_platform.activate()
with torch.device("meta"):
    made = [torch.empty(2), torch.zeros(2), torch.ones(2), torch.arange(2), torch.full((2,), 1.0), torch.randn(2)]
print({one.device.type for one in made}, torch.zeros(2, device="cuda").device.type)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="nothing stands in for CUDA where there is CUDA")
def test_device_contexts_hold_for_the_redirected_factories() -> None:
    """In a fresh process: whoever enters such a context first decides which functions it knows."""
    done = subprocess.run([sys.executable, "-c", DEVICES], capture_output=True, text=True, timeout=120)
    assert done.stdout.split("\n")[0] == "{'meta'} cpu", done.stderr
