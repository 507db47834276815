"""The policy's side of `deterministic: true`: PyTorch's own operations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from megarl.config.schema import RunConfig
from megarl.parallel.cpu_platform import has_cuda


def repeats(config: RunConfig) -> bool:
    """Whether a run is to repeat to the last bit: on the CPU each one is."""
    return config.deterministic or not has_cuda()


@contextmanager
def deterministic_algorithms(asked: bool) -> Iterator[None]:
    """PyTorch takes the algorithms that repeat inside, where `asked`; an operation without one raises `RuntimeError`.

    Only around the policy's passes: vLLM, in the same process, uses operations without one that repeat all the same.
    """
    if not asked:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    settings: Any = torch.utils.deterministic
    filled = settings.fill_uninitialized_memory
    # That would write every new tensor once more; nothing here reads what it has not written.
    settings.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        settings.fill_uninitialized_memory = filled
