"""How a process joins the world that a launcher started it in.

All launchers end in one default process group and in torchrun's environment variables, which vLLM's external launcher
reads too.
"""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from megarl.errors import Interrupted, Refusal
from megarl.parallel import cpu_platform, noise, roll_call
from megarl.parallel.place import DEFAULT_PORT, LOOPBACK, Place, find_place, place_over_mpi

#: Minutes that a rank waits for the others in a collective before it gives up.
TIMEOUT_MINUTES = 30.0

#: Seconds that the ranks wait for all of them to come.
JOIN_LIMIT = 600.0

#: Linux's name of the interface of the loopback address.
_LOOPBACK_INTERFACE = "lo"


@dataclass(frozen=True, slots=True)
class World:
    """This process's place.

    `node_of_rank[r]` numbers the host of rank r, hosts in order of their first rank; `hosts[r]` is its name.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    node_of_rank: tuple[int, ...]
    device: torch.device
    hosts: tuple[str, ...] = ()

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def join(timeout_minutes: float = TIMEOUT_MINUTES, join_limit: float = JOIN_LIMIT) -> World:
    """Join the world this process was started in and return its place in it.

    Initialises the default process group: gloo on the CPU; NCCL, with gloo for CPU tensors, on GPUs. `timeout_minutes`
    bounds each later collective, `join_limit` in seconds how long the ranks wait for each other here.
    Raises `Refusal` where a launcher gave a rank but no address to meet at, a rank that two processes have, or a port
    that is taken; `Interrupted`, naming them, where ranks do not come or do not reach each other.
    """
    cpu_platform.order_queues()
    place = _meeting_place(join_limit)
    cuda = cpu_platform.has_cuda()
    if cuda:
        place = replace(place, local_rank=_gpu(place))
    if cuda:
        torch.cuda.set_device(place.local_rank)
    formed = not dist.is_initialized()
    if formed:
        place = _form(place, "cpu:gloo,cuda:nccl" if cuda else "gloo", join_limit)
    os.environ.update(
        RANK=str(place.rank),
        WORLD_SIZE=str(place.size),
        LOCAL_RANK=str(place.local_rank),
        MASTER_ADDR=str(place.address),
        MASTER_PORT=str(place.port),
    )
    named: list[tuple[str, int | str]] = [("", "")] * place.size
    host = socket.gethostname()
    try:
        if cuda:
            # NCCL forms the group at its first collective, in which all must take part; a push is not one.
            dist.all_reduce(torch.zeros(1, device="cuda"))
        dist.all_gather_object(named, (host, host if place.node is None else place.node))
    except RuntimeError as error:
        raise _unreached(place, error) from None
    if formed:
        dist.distributed_c10d._set_pg_timeout(timedelta(minutes=timeout_minutes))
    # Imports Megatron, for which ranks may take very unlike times.
    cpu_platform.activate()
    noise.hold_back()
    nodes = [node for _, node in named]
    numbers = {node: number for number, node in enumerate(dict.fromkeys(nodes))}
    device = torch.device("cuda", place.local_rank) if cuda else torch.device("cpu")
    return World(
        rank=place.rank,
        size=place.size,
        local_rank=place.local_rank,
        local_size=nodes.count(nodes[place.rank]),
        node_of_rank=tuple(numbers[node] for node in nodes),
        device=device,
        hosts=tuple(name for name, _ in named),
    )


def _meeting_place(join_limit: float) -> Place:
    """This process's place, with rank 0's address and port."""
    place = place_over_mpi(find_place(os.environ) or Place(0, 1, 0, None, None), join_limit)
    if place.size == 1:
        # Port 0: the system chooses one as the store opens, which nobody can take in between.
        return replace(place, address=place.address or LOOPBACK, port=place.port or "0")
    if place.address is None:
        raise Refusal(
            f"rank {place.rank} of {place.size} without MASTER_ADDR",
            "processes must know where to meet",
            "set MASTER_ADDR and MASTER_PORT, or install mpi4py so that the address comes over MPI",
        )
    return replace(place, port=place.port or DEFAULT_PORT)


def _gpu(place: Place) -> int:
    """The number of this process's GPU among those that it sees."""
    seen = torch.cuda.device_count()
    if seen == 1:
        # The launcher showed each process its own alone, or there is one for one.
        return 0
    if place.local_rank >= seen:
        raise Refusal(
            f"process {place.local_rank + 1} on {socket.gethostname()}, which has {seen} GPUs",
            "each process must have a GPU of its own",
            f"start at most {seen} processes per host, or ask for more GPUs (srun --gpus-per-node)",
        )
    return place.local_rank


def _form(place: Place, backend: str, limit: float) -> Place:
    """Meet the other ranks and form the default process group with them, in `limit` seconds; returns the place with the
    port that they met at."""
    started = time.monotonic()
    if place.address == LOOPBACK and _LOOPBACK_INTERFACE in (name for _, name in socket.if_nameindex()):
        # All are on this host. gloo would look up the host's name, which a resolver need not know, for an address.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _LOOPBACK_INTERFACE)
    met = roll_call.meet(place, limit)
    store: Store = PrefixStore("default_pg", met)
    left = timedelta(seconds=max(10.0, limit - (time.monotonic() - started)))
    try:
        # gloo waits five times as long as it is told to for a connection.
        dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.size, timeout=left / 5)
        dist.distributed_c10d._set_pg_timeout(left)
    except RuntimeError as error:
        raise _unreached(place, error) from None
    opened: Any = met.underlying_store
    return replace(place, port=str(opened.port))


def _unreached(place: Place, error: RuntimeError) -> Interrupted:
    return Interrupted(
        f"rank {place.rank} of {place.size} on {socket.gethostname()} could not connect to the other ranks, though "
        f"all of them came ({roll_call.cause_of(error)}): see whether one of them ended, name the "
        "network between the hosts by GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, and start again with resume=auto"
    )


def leave() -> None:
    """Take down the default process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
