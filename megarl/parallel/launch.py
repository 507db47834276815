"""Starts the local processes of a run with torch's elastic launcher.

On the CPU the workers are forked from a parent that has already imported the function they run, and
with it the heavy libraries: they start at once and share that memory. With CUDA they are spawned,
because a CUDA context does not survive a fork.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from typing import Any, TypeVar

from megarl.errors import MegarlError

T = TypeVar("T")


def launch(function: Callable[..., T], args: tuple[Any, ...], processes: int) -> T:
    """Run `function(*args)` in that many local processes and return rank 0's result.

    One process runs here, in this process. A `MegarlError` raised by a worker is raised again here.
    Other failures raise torch's `ChildFailedError`, which names rank, exit code and error.
    """
    threads = os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    if processes == 1:
        return function(*args)

    import torch
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    torch.set_num_threads(int(threads))
    fork = not torch.cuda.is_available()
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        start_method="fork" if fork else "spawn",
        max_restarts=0,
        monitor_interval=0.2,
        logs_specs=DefaultLogsSpecs(),
    )
    results = elastic_launch(config, _worker)(function, args)
    error, value = results[0]
    first_error = error or next((e for e, _ in results.values() if e), None)
    if first_error is not None:
        raise first_error
    return value


def _worker(function: Callable[..., T], args: tuple[Any, ...]) -> tuple[MegarlError | None, T | None]:
    """Carry a user-facing error back as a value, so that the parent prints its sentence and no traceback."""
    try:
        value = function(*args)
    except MegarlError as error:
        return error, None
    return None, value if os.environ.get("RANK") == "0" else None
