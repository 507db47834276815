"""Memory at the end of a step's phases: what is held, and whether it grows from step to step.

    asleep ──▶ train ──▶ push ──▶ generate ──▶ asleep

While `asleep` neither the policy nor the engine has memory on the GPU: what is held then is everybody else's, such as
CUDA's context, communicators, captured graphs, and what was lost. On the CPU, where nothing leaves, it is the process's
resident memory, whose growth says nothing: pages of the engine's cache become resident as they are first written.
"""

from __future__ import annotations

import resource
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from megarl.parallel.cpu_platform import has_cuda
from megarl.parallel.exchange import gather_all

Moment = Literal["push", "generate", "asleep", "train"]

MIB, GIB = 1 << 20, 1 << 30
#: Steps over which memory must not grow; steps at each end of which the least counts, since no two hold the same; and
#: first steps, in which communicators and caches come. Our choice.
OVER, AMONG, BEFORE = 50, 5, 5


class MemoryWatch:
    """This rank's memory at the end of each phase. `limit_mib`: growth that is told; None: none is. `watches`: whether
    anything is told at all, by default on a GPU."""

    def __init__(self, limit_mib: float | None, *, watches: bool | None = None) -> None:
        self._limit = limit_mib
        self._watches = has_cuda() if watches is None else watches
        self._held: dict[str, int] = {}
        self._tensors: dict[str, int] = {}
        self._growth = Growth()
        self._told = False

    def note(self, moment: Moment) -> None:
        """A phase ends, or with `asleep` what is between two of them."""
        self._held[moment] = held_bytes()
        if has_cuda():
            # PyTorch counts a sleeping engine's tensors, which keep their addresses.
            self._tensors[moment] = torch.cuda.memory_allocated()

    @property
    def held(self) -> dict[str, int]:
        """This rank's bytes at the last end of each phase, as in `memory_bytes`."""
        return dict(self._held)

    def take(self) -> tuple[dict[str, Any], str | None]:
        """The step's numbers for its record, each the largest of any rank, and what is to be told of them. Collective.

        `memory_bytes`: held by the moment; of a GPU all that is in use, and `tensor_bytes` beside it in tensors.
        """
        self.note("train")
        grown = self._growth.add(self._held.get("asleep", self._held["train"]))
        found = gather_all((self._held, self._tensors, grown, peak_memory_bytes()))
        held, tensors = (_largest(one[part] for one in found) for part in (0, 1))
        grown, peak = max(one[2] for one in found), max(one[3] for one in found)
        numbers = {"peak_memory_bytes": peak, "memory_bytes": held} | ({"tensor_bytes": tensors} if tensors else {})
        return numbers, self._sentence(grown, held) if self._watches else None

    def _sentence(self, grown: int, held: Mapping[str, int]) -> str | None:
        first, self._told = not self._told, True
        amounts = ", ".join(f"{moment} {held[moment] / GIB:.2f}" for moment in held)
        by_phase = f"memory at the end of each phase, in GiB: {amounts}"
        if self._limit is not None and grown > self._limit * MIB:
            self._growth.begin_anew()
            return (
                f"warning: memory has grown by {grown / MIB:.0f} MiB in {OVER} steps, more than "
                f"health.memory_growth_mib={self._limit:g}; {by_phase}. A run that goes on like this ends without "
                "memory; stopped and continued with resume=auto it begins anew"
            )
        return by_phase if first else None


class Growth:
    """Of bytes that are held at the same moment of every step, over the last `OVER` steps."""

    def __init__(self) -> None:
        self._bytes: deque[int] = deque(maxlen=OVER + AMONG)
        self._before = BEFORE

    def add(self, held: int) -> int:
        """A step holds so many; by how many these have grown, 0 until that can be said."""
        if self._before:
            self._before -= 1
            return 0
        self._bytes.append(held)
        if len(self._bytes) < OVER + AMONG:
            return 0
        known = list(self._bytes)
        return min(known[-AMONG:]) - min(known[:AMONG])

    def begin_anew(self) -> None:
        """What has grown so far was told."""
        self._bytes.clear()


def held_bytes() -> int:
    """Memory in use now: of this process's GPU, by whoever, else resident memory."""
    if has_cuda():
        free, total = torch.cuda.mem_get_info()
        return total - free
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()


def peak_memory_bytes() -> int:
    """Most memory this process has held: of its GPU where it has one, else resident memory."""
    if has_cuda():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _largest(parts: Any) -> dict[str, int]:
    found: dict[str, int] = {}
    for part in parts:
        for moment, held in part.items():
            found[moment] = max(held, found.get(moment, 0))
    return found
