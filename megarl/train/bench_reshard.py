"""The weight push beside one that gathers: seconds, bytes received, memory, and whether both fill the engine alike."""

from __future__ import annotations

import ctypes
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megarl.config.model_shape import read_model_shape
from megarl.config.schema import RunConfig
from megarl.parallel import bootstrap
from megarl.parallel.cpu_platform import has_cuda
from megarl.parallel.exchange import gather_all
from megarl.parallel.groups import form_grid
from megarl.policy.hf_weights import draw_random_weights
from megarl.policy.policy import Policy
from megarl.reshard.boxes import missing_bytes
from megarl.rollout import vllm_setup
from megarl.rollout.engine import Engine
from megarl.weights.gather import GatherPush
from megarl.weights.push import Push
from megarl.weights.push_plan import engine_tensors, policy_tensors, push_wire

vllm_setup.preload()

#: glibc's names for the size from which it maps blocks by themselves, and for the free memory at the heap's end from
#: which it gives that back (malloc.h).
M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1


def bench_reshard(config: RunConfig) -> dict[str, Any]:
    """Push by the plan and by gathering, in turns, `config.steps` times after one of each; medians of seconds.

    Weights are drawn from the seed. Returns `seconds` and `gather_seconds` (until the slowest rank is done), their
    `ratios` turn by turn, `unchecked_seconds` and `checked_seconds` (without and with the checksum), `check_seconds`
    (the look at the engine after a generation), `bytes_received_max_rank` and `gather_bytes_received_max_rank` as
    counted where they arrive, `bytes_lower_bound_max_rank` (what the rank that lacks most needs and does not hold),
    `peak_extra_bytes` and `gather_peak_extra_bytes` (the largest process's memory above what it had before),
    `bucket_bytes`, `bitwise_equal`: whether engines that either has filled hold the same bits, on every rank.
    """
    world = bootstrap.join()
    # For the measurement of memory: what glibc keeps of freed blocks would count as if it were in use.
    _set_glibc(map_from=1 << 16)
    grid = form_grid(config.parallel, config.seed)
    shape = read_model_shape(config.model.path)
    engine = Engine(config, shape, eos_token_ids=shape.eos_token_ids, rank=world.rank, world_size=world.size)
    engine.sleep()
    policy = Policy(config, shape, world, grid, step_budget=1)
    draw_random_weights(policy, config.seed)
    push, gather = Push(policy, engine), GatherPush(policy, engine)
    engine.wake_weights()
    fills = {"push": push.run, "gather": gather.run}
    turns = fills | {
        "unchecked": lambda: push.run(checked=False),
        "checked": lambda: push.run(checked=True),
        # Of the checked push before it.
        "check": push.check,
    }
    hashes: list[str] = []
    for fill in fills.values():
        # Other weights first, so that no fill can leave any of the last one's.
        _negate(policy)
        push.run()
        _negate(policy)
        fill()
        hashes.append(push.engine_weights.checksum())
    peaks = {name: max(gather_all(_extra(fill))) for name, fill in fills.items()}
    # For that of time: as glibc is by itself where large blocks come and go.
    _set_glibc(map_from=32 << 20)
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for turn in range(config.steps + 1):
        if world.is_first:
            print(f"turn {turn} of {config.steps}", file=sys.stderr, flush=True)
        # Forth and back, so that each comes as often before another as after it; `check` always has its push before it.
        for name, fill in list(turns.items())[:: -1 if turn % 2 else 1]:
            seconds[name].append(_seconds(fill))
    # The first turn warms up.
    seconds = {name: values[1:] for name, values in seconds.items()}
    needs = missing_bytes(
        engine_tensors(config, shape, world.rank).values(),
        policy_tensors(config, shape, grid).values(),
        push_wire(config, shape),
    )
    report = {
        "seconds": round(statistics.median(seconds["push"]), 4),
        "gather_seconds": round(statistics.median(seconds["gather"]), 4),
        "ratios": [round(slow / fast, 2) for fast, slow in zip(seconds["push"], seconds["gather"], strict=True)],
        **{f"{name}_seconds": round(statistics.median(seconds[name]), 4) for name in ("unchecked", "checked", "check")},
        "bytes_received_max_rank": max(gather_all(push.mover.received_bytes)),
        "gather_bytes_received_max_rank": max(gather_all(gather.received_bytes)),
        "bytes_lower_bound_max_rank": max(gather_all(needs)),
        "peak_extra_bytes": peaks["push"],
        "gather_peak_extra_bytes": peaks["gather"],
        "bucket_bytes": int(config.weights.bucket_mib * 2**20),
        "bitwise_equal": all(gather_all(hashes[0] == hashes[1])),
    }
    engine.close()
    bootstrap.leave()
    return report


def _negate(policy: Policy) -> None:
    with torch.no_grad():
        for _, parameter in policy.named_parameters():
            parameter.neg_()


def _seconds(work: Callable[[], None]) -> float:
    """Seconds until the slowest rank has done `work`."""
    dist.barrier()
    start = time.perf_counter()
    work()
    dist.barrier()
    return time.perf_counter() - start


def _extra(work: Callable[[], None]) -> int:
    """This process's most memory during `work` above what it had before, in bytes."""
    if has_cuda():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before = _memory("VmRSS")
    dist.barrier()
    work()
    dist.barrier()
    return _memory("VmHWM") - before


def _set_glibc(map_from: int) -> None:
    """Have glibc map blocks from that size on by themselves, and give them back when they are freed."""
    if not has_cuda():
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, map_from)
        libc.mallopt(M_TRIM_THRESHOLD, 2 * map_from)


def _memory(kind: str) -> int:
    """Bytes resident now (VmRSS) or at most (VmHWM); on a GPU, bytes of tensors there."""
    if has_cuda():
        return torch.cuda.memory_allocated() if kind == "VmRSS" else torch.cuda.max_memory_allocated()
    found = re.search(rf"{kind}:\s*(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert found is not None
    return int(found[1]) * 1024
