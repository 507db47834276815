"""How a process finds its place: rank, world size and rendezvous from whichever launcher started it.

torchrun sets RANK and its siblings; `srun` sets SLURM_*; `mpirun` sets OMPI_* or PMI_*. All of them end
in one default process group and in torchrun's environment variables, which vLLM's external launcher
reads too.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megarl.errors import Refusal
from megarl.parallel import cpu_platform


@dataclass(frozen=True, slots=True)
class World:
    """This process's place. `node_of_rank[r]` numbers the host of rank r, hosts in order of their first rank."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    node_of_rank: tuple[int, ...]
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0


@dataclass(frozen=True, slots=True)
class Place:
    """What a launcher's environment says, before any communication."""

    rank: int
    size: int
    local_rank: int
    address: str | None
    port: str | None


def find_place(environment: Mapping[str, str]) -> Place | None:
    """Read a launcher's variables; None where no launcher started this process."""
    address, port = environment.get("MASTER_ADDR"), environment.get("MASTER_PORT")
    if "RANK" in environment and "WORLD_SIZE" in environment:
        local = environment.get("LOCAL_RANK", "0")
        return Place(int(environment["RANK"]), int(environment["WORLD_SIZE"]), int(local), address, port)
    if "OMPI_COMM_WORLD_RANK" in environment:
        rank, size = int(environment["OMPI_COMM_WORLD_RANK"]), int(environment["OMPI_COMM_WORLD_SIZE"])
        return Place(rank, size, int(environment.get("OMPI_COMM_WORLD_LOCAL_RANK", "0")), address, port)
    if "SLURM_PROCID" in environment and int(environment.get("SLURM_NTASKS", "1")) > 1:
        rank, size = int(environment["SLURM_PROCID"]), int(environment["SLURM_NTASKS"])
        nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
        job = int(environment.get("SLURM_JOB_ID", "0"))
        # All tasks of a job derive the same free-range port from the job's number.
        default_port = str(20000 + job % 20000)
        local = int(environment.get("SLURM_LOCALID", "0"))
        return Place(rank, size, local, address or first_host(nodes), port or default_port)
    if "PMI_RANK" in environment:
        rank, size = int(environment["PMI_RANK"]), int(environment["PMI_SIZE"])
        return Place(rank, size, int(environment.get("MPI_LOCALRANKID", "0")), address, port)
    return None


def first_host(nodelist: str) -> str:
    """First host of a Slurm node list: `gpu[07-09,12],x1` -> `gpu07`."""
    match = re.match(r"([^,\[]+)(?:\[(\d+))?", nodelist)
    return (match.group(1) + (match.group(2) or "")) if match else "127.0.0.1"


#: Minutes that a rank waits for the others in a collective before it gives up.
TIMEOUT_MINUTES = 30.0


def join(timeout_minutes: float = TIMEOUT_MINUTES) -> World:
    """Join the world this process was started in and return its place in it.

    Initialises the default process group: gloo on the CPU; NCCL, with gloo for CPU tensors, on GPUs.
    Raises `Refusal` where a launcher gave a rank but no address to meet at.
    """
    place = find_place(os.environ) or Place(0, 1, 0, None, None)
    address = place.address or _address_over_mpi(place)
    port = place.port or ("0" if place.size == 1 else "29500")
    if place.size == 1 and port == "0":
        port = str(free_port())
    os.environ.update(
        RANK=str(place.rank),
        WORLD_SIZE=str(place.size),
        LOCAL_RANK=str(place.local_rank),
        MASTER_ADDR=address,
        MASTER_PORT=port,
    )
    cuda = cpu_platform.has_cuda()
    if cuda:
        torch.cuda.set_device(place.local_rank)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(minutes=timeout_minutes))
    cpu_platform.activate()
    if cuda:
        # NCCL forms the group at its first collective, in which all must take part; a push is not one.
        dist.all_reduce(torch.zeros(1, device="cuda"))
    hosts: list[str] = [""] * place.size
    dist.all_gather_object(hosts, socket.gethostname())
    numbers = {host: number for number, host in enumerate(dict.fromkeys(hosts))}
    device = torch.device("cuda", place.local_rank) if cuda else torch.device("cpu")
    local_size = hosts.count(hosts[place.rank])
    return World(place.rank, place.size, place.local_rank, local_size, tuple(numbers[h] for h in hosts), device)


def leave() -> None:
    """Take down the default process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def free_port() -> int:
    """A TCP port free on this host at the time of the call."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]


def _address_over_mpi(place: Place) -> str:
    """Host name of rank 0. One process needs none; more ask mpi4py, since mpirun sets no address."""
    if place.size == 1:
        return "127.0.0.1"
    try:
        from mpi4py import MPI
    except ImportError:
        raise Refusal(
            f"rank {place.rank} of {place.size} without MASTER_ADDR",
            "processes must know where to meet",
            "set MASTER_ADDR and MASTER_PORT, or install mpi4py so that the address comes over MPI",
        ) from None
    return MPI.COMM_WORLD.bcast(socket.gethostname() if place.rank == 0 else None, root=0)
