"""What this GPU does at best: the rates that others are measured by."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

SIDE = 8192
TURNS = 10


def seconds(work: Callable[[], object]) -> float:
    """Median of a call on the GPU, once it is warm."""
    taken = []
    for turn in range(TURNS + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        taken += [start.elapsed_time(end) / 1e3] if turn >= 3 else []
    return statistics.median(taken)


def test_products(figure) -> None:
    a, b = (torch.randn(SIDE, SIDE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    found = 2 * SIDE**3 / seconds(lambda: a @ b.T) / 1e12
    figure("BF16 product", found, "TFLOP/s")
    low_a, low_b = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
    one = torch.ones((), device="cuda")
    scaled_product: Any = torch._scaled_mm  # pyright: ignore[reportPrivateImportUsage]
    low = seconds(lambda: scaled_product(low_a, low_b.T, one, one, out_dtype=torch.bfloat16))
    figure("FP8 product", 2 * SIDE**3 / low / 1e12, "TFLOP/s")
    assert found > 0


def test_copies(figure) -> None:
    source = torch.empty(1 << 30, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    figure("copy on the device", source.numel() / seconds(lambda: target.copy_(source)) / 1e9, "GB/s")
    host = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
    part = target[: host.numel()]
    figure("copy to pinned memory", host.numel() / seconds(lambda: host.copy_(part, non_blocking=True)) / 1e9, "GB/s")
    assert torch.equal(part.cpu(), host)
