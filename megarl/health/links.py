"""Times links between ranks: a ring in which each rank sends to the next, and a small all-reduce. Collective."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
import torch.distributed as dist

from megarl.health.readiness import Link
from megarl.parallel.bootstrap import World
from megarl.parallel.exchange import gather_all

#: Messages in a row that a link is timed with, after one that opens it.
_MESSAGES = 3
#: Size of the all-reduce's tensor in elements of fp32: 1 MiB.
_ELEMENTS = 1 << 18


def time_ring(world: World, message_bytes: int) -> list[Link]:
    """The links from each rank to the next, timed over the device's own way: NCCL on GPUs, gloo on the CPU.

    Half of the links at a time, whatever the size of the world. The same list on every rank, in the order of targets.
    """
    if world.size == 1:
        return []
    message = torch.zeros(message_bytes, dtype=torch.uint8, device=world.device)
    after, before = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    speed = 0.0
    for senders in _turns(world.size):
        if world.rank in senders:
            for _ in range(1 + _MESSAGES):
                _move(message, to=after)
        if before in senders:
            _move(message, source=before)
            start = time.perf_counter()
            for _ in range(_MESSAGES):
                _move(message, source=before)
            speed = _MESSAGES * message_bytes / (time.perf_counter() - start) / 1e9
    speeds = gather_all(speed)
    return [Link((rank - 1) % world.size, rank, speed) for rank, speed in enumerate(speeds)]


def time_all_reduce(world: World) -> float:
    """Seconds of an all-reduce of 1 MiB over all ranks, the best of a few."""
    tensor = torch.zeros(_ELEMENTS, device=world.device)
    best = float("inf")
    for _ in range(1 + _MESSAGES):
        start = time.perf_counter()
        dist.all_reduce(tensor)
        _wait(tensor)
        best = min(best, time.perf_counter() - start)
    return best


def clock_against_first(world: World, repeats: int = 4) -> tuple[float, float] | None:
    """Seconds that this host's clock is ahead of rank 0's, and by how much that may be wrong.

    Of the first rank of each host; None on the others. Rank 0 asks for the time, and takes the answer to be from the
    middle of the wait; of several waits the shortest counts, and half of it is the doubt.
    """
    firsts = first_ranks(world)
    if world.rank == 0:
        found = {0: (0.0, 0.0)} | {rank: _ask(rank, repeats) for rank in firsts if rank != 0}
        for rank in firsts[1:]:
            dist.send(torch.tensor(found[rank], dtype=torch.float64), rank)
        return found[0]
    if world.rank not in firsts:
        return None
    now = torch.zeros(1, dtype=torch.float64)
    for _ in range(repeats):
        dist.recv(now, 0)
        now[0] = time.time()
        dist.send(now, 0)
    answer = torch.zeros(2, dtype=torch.float64)
    dist.recv(answer, 0)
    return answer[0].item(), answer[1].item()


def first_ranks(world: World) -> list[int]:
    """The first rank of each host, rank 0 first."""
    return [world.node_of_rank.index(node) for node in dict.fromkeys(world.node_of_rank)]


def _ask(rank: int, repeats: int) -> tuple[float, float]:
    best = (0.0, float("inf"))
    answer = torch.zeros(1, dtype=torch.float64)
    for _ in range(repeats):
        sent = time.time()
        start = time.perf_counter()
        dist.send(answer, rank)
        dist.recv(answer, rank)
        wait = time.perf_counter() - start
        if wait / 2 < best[1]:
            best = (answer.item() - (sent + wait / 2), wait / 2)
    return best


def _turns(size: int) -> Iterator[range]:
    """Ranks that send at the same time: none of them receives meanwhile."""
    even = size - size % 2
    yield range(0, even, 2)
    yield range(1, even, 2)
    if size % 2:
        # The last one would meet rank 0 as an even one too.
        yield range(even, size)


def _move(message: torch.Tensor, *, to: int | None = None, source: int | None = None) -> None:
    """Send or receive over the default group's own connections: a plain send over NCCL would open one per pair."""
    if to is not None:
        works = dist.batch_isend_irecv([dist.P2POp(dist.isend, message, to)])
    else:
        assert source is not None
        works = dist.batch_isend_irecv([dist.P2POp(dist.irecv, message, source)])
    for work in works:
        work.wait()
    _wait(message)


def _wait(tensor: torch.Tensor) -> None:
    if tensor.device.type == "cuda":
        torch.cuda.synchronize(tensor.device)
