"""The processes that share a conversion: those of an `mpirun` or `srun`, by mpi4py, or this one alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from megarl.config.environment_variables import whole_number
from megarl.errors import Refusal

T = TypeVar("T")

#: What launchers say of the number of processes.
_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")


class Ranks:
    """This process among those that work together; they share a file system."""

    def __init__(self, communicator: Any = None) -> None:
        self._communicator = communicator
        self.rank: int = 0 if communicator is None else communicator.Get_rank()
        self.size: int = 1 if communicator is None else communicator.Get_size()

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, pieces: Sequence[T]) -> list[T]:
        """This process's part of the pieces, the same for the same size."""
        return list(pieces[self.rank :: self.size])

    def once(self, action: Callable[[], T]) -> T:
        """What `action` returns on the first process, on all of them; all wait for it."""
        if self._communicator is None:
            return action()
        return self._communicator.bcast(action() if self.is_first else None, root=0)

    def gather(self, value: T) -> list[T]:
        """Every process's value, by rank, on the first; an empty list on the others."""
        if self._communicator is None:
            return [value]
        return self._communicator.gather(value, root=0) or []

    def sum(self, value: int) -> int:
        """The sum of every process's value, on all of them."""
        return value if self._communicator is None else self._communicator.allreduce(value)

    def wait(self) -> None:
        """Return when all processes have come here."""
        if self._communicator is not None:
            self._communicator.Barrier()

    def abort(self, code: int) -> None:
        """End all processes, which would wait for this one for ever. Returns where there are no others."""
        if self.size > 1:
            self._communicator.Abort(code)


def find_ranks() -> Ranks:
    """The processes of this launch. Raises `Refusal` where there are several that do not find each other over MPI."""
    size = next((whole_number(os.environ, name) for name in _SIZES if name in os.environ), 1)
    if size == 1:
        return Ranks()
    try:
        from mpi4py import MPI
    except ImportError:
        raise Refusal(
            f"{size} processes without mpi4py", "they share the work over MPI", "install mpi4py, or start one process"
        ) from None
    found = MPI.COMM_WORLD.Get_size()
    if found != size:
        raise Refusal(
            f"{size} processes of which MPI knows {found}",
            "must find each other: each alone would do all of the work",
            "start them by the mpirun of the MPI that mpi4py was built for, or by srun with --mpi=pmix",
        )
    return Ranks(MPI.COMM_WORLD)
