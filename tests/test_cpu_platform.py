"""What stands in for CUDA leaves the rest of PyTorch as it is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import parity
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


@pytest.mark.parametrize("given", [None, "8"])
def test_queues_are_in_order_before_cuda_is_asked_for(given: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    from megarl.parallel import bootstrap, cpu_platform

    class Asked(Exception):
        pass

    def has_cuda() -> bool:
        raise Asked(os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS"))

    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    if given is not None:
        monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", given)
    monkeypatch.setattr(cpu_platform, "has_cuda", has_cuda)
    monkeypatch.setattr(bootstrap, "_meeting_place", lambda limit: None)
    with pytest.raises(Asked, match=f"^{given or 1}$"):
        bootstrap.join()


def threads_of_an_update(world: Any, folder: Path) -> tuple[int, int]:
    """Threads of this process before and after an update of all weights by two threads. A scenario of `run_world`."""
    torch.set_num_threads(2)
    torch.ones(1 << 20).exp()
    with parity.policy_of(parity.run_config(folder / "qwen2-tied"), world) as policy:
        batch = parity.mini_batch(0)
        values = [np.full(s.trained, -4.5) for s in batch]
        policy.measure(batch)
        before = len(os.listdir("/proc/self/task"))
        parity.update(policy, parity.grpo(policy.config), parity.with_old_log_probs(batch, values, 0))
        return before, len(os.listdir("/proc/self/task"))


def test_an_update_starts_no_further_threads(tmp_path: Path):
    """With more threads of OpenMP than cores none of them spins between loops any more."""
    parity.write_model(tmp_path, "qwen2-tied")
    ((before, after),) = parity.run_world("test_cpu_platform", "threads_of_an_update", 1, tmp_path)
    assert after == before
