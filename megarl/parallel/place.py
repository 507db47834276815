"""What a launcher says of this process's place: rank, world size, host, and where to meet. Free of torch.

torchrun sets RANK and its siblings; `srun` sets SLURM_*; `mpirun` sets OMPI_* or PMI_*. Under MPI, mpi4py has the last
word where it is installed, since only MPI knows where rank 0 is and, but for Slurm's, the layout of hosts: an Open MPI
that Slurm's PMIx started may take each process for the only one of its host.
"""

from __future__ import annotations

import faulthandler
import itertools
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from megarl.config.environment_variables import whole_number
from megarl.errors import Refusal

#: Where processes of one host meet: no name that a resolver would have to know.
LOOPBACK = "127.0.0.1"

#: A process that a launcher started has one of these: its rank.
RANK_NAMES = ("RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID", "PMI_RANK")

#: The port that ranks meet at where nothing else names one.
DEFAULT_PORT = "29500"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a process stands. `address` and `port` are rank 0's, None where the launcher does not say.

    `mpi`: an MPI launcher started it. `guessed`: the address is Slurm's first host, where MPI's rank 0 need not be.
    `node` is equal on a host's processes, None where host names or MPI must tell. `listener` is rank 0's socket at
    `port`, where it has chosen that: it is held until the ranks' store takes it over.
    """

    rank: int
    size: int
    local_rank: int
    address: str | None
    port: str | None
    mpi: bool = False
    guessed: bool = False
    node: int | None = None
    listener: socket.socket | None = field(default=None, compare=False, repr=False)


def find_place(environment: Mapping[str, str]) -> Place | None:
    """Read a launcher's variables; None where no launcher started this process. Starts nothing, MPI neither."""
    place = _read_place(environment)
    if place is not None and not (place.size >= 1 and 0 <= place.rank < place.size and place.local_rank >= 0):
        raise Refusal(
            f"rank {place.rank} of {place.size} processes, local rank {place.local_rank}",
            "must be a place that a launcher gives: ranks count from 0 up to the number of processes",
            f"correct what sets the environment ({', '.join(_given(environment))}), or start by a launcher",
        )
    return place


#: Variables that say a process's place, of which some are enough.
_PLACES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
    "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID",
)  # fmt: skip


def _given(environment: Mapping[str, str]) -> list[str]:
    return [f"{name}={environment[name]}" for name in _PLACES if name in environment]


def _read_place(environment: Mapping[str, str]) -> Place | None:
    address, port = environment.get("MASTER_ADDR"), environment.get("MASTER_PORT")

    def number(name: str, default: str = "0") -> int:
        return whole_number(environment, name, default)

    if "RANK" in environment and "WORLD_SIZE" in environment:
        return Place(number("RANK"), number("WORLD_SIZE"), number("LOCAL_RANK"), address, port)
    if "RANK" in environment:
        raise Refusal(
            f"RANK={environment['RANK']} in the environment, without WORLD_SIZE",
            "must come with the number of processes",
            "unset RANK for a run of this process alone, or start by a launcher, which sets both",
        )
    hosts = slurm_hosts(environment)
    guessed = bool(hosts) and not address
    if hosts:
        address = address or hosts[0]
        # All tasks of a step derive the same port, outside the ephemeral range, and other steps and jobs another.
        port = port or str(20000 + (number("SLURM_JOB_ID") + 1009 * number("SLURM_STEP_ID")) % 12000)
    if "OMPI_COMM_WORLD_RANK" in environment:
        rank, size = number("OMPI_COMM_WORLD_RANK"), number("OMPI_COMM_WORLD_SIZE")
        return Place(rank, size, number("OMPI_COMM_WORLD_LOCAL_RANK"), address, port, mpi=True, guessed=guessed)
    # Before Slurm's: MPICH's mpirun in a batch job inherits the SLURM_PROCID of what started it.
    if "PMI_RANK" in environment and "PMI_SIZE" in environment:
        local = number("MPI_LOCALRANKID", environment.get("SLURM_LOCALID", "0"))
        return Place(number("PMI_RANK"), number("PMI_SIZE"), local, address, port, mpi=True, guessed=guessed)
    # Of the step, not of the job: a batch script has SLURM_PROCID and SLURM_NTASKS too, and is alone.
    if "SLURM_PROCID" in environment and (size := number("SLURM_STEP_NUM_TASKS", "1")) > 1:
        # Without a plug-in for MPI, MPI would take each task for the only one.
        mpi = "PMIX_RANK" in environment
        node = number("SLURM_NODEID") if "SLURM_NODEID" in environment else None
        return Place(number("SLURM_PROCID"), size, number("SLURM_LOCALID"), address, port, mpi=mpi, node=node)
    return None


def slurm_hosts(environment: Mapping[str, str]) -> list[str]:
    """The hosts of the Slurm step or job that this process is in, in Slurm's order; none outside Slurm."""
    return expand_hosts(environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", ""))


def expand_hosts(nodelist: str) -> list[str]:
    """The hosts of a Slurm node list: `gpu[07-09,12],x1` -> gpu07, gpu08, gpu09, gpu12, x1.

    Of several brackets in a name the last counts fastest: `r[1-2]n[1-2]` -> r1n1, r1n2, r2n1, r2n2.
    Raises `Refusal` for what is no such list.
    """
    if re.fullmatch(f"(?:{_NAME},)*(?:{_NAME})?", nodelist) is None:
        raise Refusal(
            f"node list {nodelist!r} of Slurm",
            "must be host names with numbers in brackets, such as gpu[07-09,12]",
            "unset SLURM_JOB_NODELIST and SLURM_STEP_NODELIST outside a job, or set MASTER_ADDR and MASTER_PORT",
        )
    hosts: list[str] = []
    for name in re.findall(_NAME, nodelist):
        parts = re.split(r"\[([^\]]*)\]", name)
        # Every second part stood in brackets.
        choices = [_numbers(part) if index % 2 else [part] for index, part in enumerate(parts)]
        hosts += ["".join(chosen) for chosen in itertools.product(*choices)]
    return hosts


#: A name of a node list, with any number of brackets, and what may stand in those.
_RANGES = r"[0-9]+(?:-[0-9]+)?(?:,[0-9]+(?:-[0-9]+)?)*"
_NAME = rf"(?:[^,\[\]\s]|\[{_RANGES}\])+"


def _numbers(ranges: str) -> list[str]:
    """`07-09,12` -> 07, 08, 09, 12: a range keeps the width of its first number."""
    numbers: list[str] = []
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        numbers += [f"{number:0{len(first)}d}" for number in range(int(first), int(last or first) + 1)]
    return numbers


def place_over_mpi(place: Place, limit: float) -> Place:
    """`place` as MPI knows it: rank, size, layout of hosts, and rank 0's host and a free port where none were given.

    As it was, where no MPI launcher started the process, it is the only one, or there is no mpi4py or no MPI library.
    MPI is started and ended again: what ends a rank later is then not held up by it. Where the start takes longer than
    `limit` seconds, as it does while a rank has not come to it, the process ends with its stack. Raises `Refusal` where
    MPI knows another number of processes than the launcher.
    """
    if not place.mpi or place.size == 1:
        return place
    # The start of MPI waits for all ranks and lets no other thread of Python run meanwhile.
    faulthandler.dump_traceback_later(limit, exit=True)
    try:
        mpi = _load_mpi()
        if mpi is None:
            return place
        started = not mpi.Is_initialized()
        if started:
            mpi.Init()
        try:
            return _asked(mpi, place)
        finally:
            if started:
                mpi.Finalize()
    finally:
        faulthandler.cancel_dump_traceback_later()


def _load_mpi() -> Any:
    """mpi4py's MPI, not started yet; None without mpi4py or without an MPI library."""
    try:
        import mpi4py

        mpi4py.rc.initialize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError):
        # RuntimeError: mpi4py is there, and finds no library to load.
        return None
    return MPI


def _asked(mpi: Any, place: Place) -> Place:
    world = mpi.COMM_WORLD
    if world.Get_size() != place.size:
        raise Refusal(
            f"{place.size} processes of which MPI knows {world.Get_size()}",
            "must find each other",
            "start them by the mpirun of the MPI that mpi4py was built for, or by srun with --mpi=pmix or --mpi=none",
        )
    node, local_rank = place.node, place.local_rank
    if node is None:
        host = world.Split_type(mpi.COMM_TYPE_SHARED)
        node, local_rank = host.bcast(world.Get_rank(), root=0), host.Get_rank()
        host.Free()
    found = replace(place, rank=world.Get_rank(), local_rank=local_rank, node=node, guessed=False)
    if place.address is not None and not place.guessed:
        return replace(found, port=place.port or DEFAULT_PORT)
    # On one host no name needs to be known.
    address = LOOPBACK if len(set(world.allgather(node))) == 1 else socket.gethostname()
    listener = _listen() if world.Get_rank() == 0 else None
    address, port = world.bcast((address, str(listener.getsockname()[1])) if listener else None, root=0)
    return replace(found, address=address, port=port, listener=listener)


def _listen() -> socket.socket:
    """A socket that listens at a port of the system's choice, which is nobody else's from then on."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=socket.SOMAXCONN)
    return socket.create_server(("", 0), backlog=socket.SOMAXCONN)
