"""Starts the local processes of a run with torch's elastic launcher.

On the CPU the workers are forked from a parent that has already imported the function they run, and
with it the heavy libraries: they start at once and share that memory. With CUDA they are spawned,
because a CUDA context does not survive a fork.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from megarl.errors import MegarlError

T = TypeVar("T")


def launch(function: Callable[..., T], args: tuple[Any, ...], processes: int) -> T:
    """Run `function(*args)` in that many local processes and return rank 0's result.

    One process runs here, in this process. When a worker raises, the others are ended; a `MegarlError` is
    raised again here, another failure as torch's `ChildFailedError`, which names rank, exit code and error.
    """
    threads = os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    if processes == 1:
        return function(*args)

    import torch
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    torch.set_num_threads(int(threads))
    # The launcher's own log repeats what the exception says, around a sentence that is meant to stand alone.
    for name in ("torch.distributed.elastic", "torch.multiprocessing.spawn"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        start_method="spawn" if torch.cuda.is_available() else "fork",
        max_restarts=0,
        monitor_interval=0.2,
        logs_specs=DefaultLogsSpecs(),
    )
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "error"
        try:
            return elastic_launch(config, _worker)(function, args, str(report))[0]
        except ChildFailedError:
            if report.is_file():
                raise pickle.loads(report.read_bytes()) from None
            raise


def _worker(function: Callable[..., T], args: tuple[Any, ...], report: str) -> T | None:
    """Run the function; a user-facing error is left in the file `report`, for the parent to print its sentence.

    The process then fails, so that the launcher ends the others, which may be waiting for this one.
    """
    # Forked workers inherit the launcher's handler, which would answer the end with a traceback from each of them.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _wait_for_all(Path(report).parent)
    try:
        value = function(*args)
    except MegarlError as error:
        partial = Path(f"{report}.{os.environ['RANK']}")
        partial.write_bytes(pickle.dumps(error))
        partial.replace(report)
        raise
    return value if os.environ["RANK"] == "0" else None


def _wait_for_all(folder: Path) -> None:
    """Wait until every worker is there, before any of them connects to the launcher.

    For each connection a thread of the launcher looks up the peer's name. A worker that is forked in the midst of that
    inherits the resolver's lock without the thread that would release it, and would wait for it for ever.
    """
    (folder / f"started.{os.environ['RANK']}").touch()
    while len(list(folder.glob("started.*"))) < int(os.environ["WORLD_SIZE"]):
        time.sleep(0.01)
