"""Starts the local processes of a run, by torch's multiprocessing.

On the CPU the workers are forked from a parent that has already imported the function they run, and
with it the heavy libraries: they start at once and share that memory. With CUDA they are spawned,
because a CUDA context does not survive a fork.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from megarl.config.environment_variables import whole_number
from megarl.errors import Interrupted, MegarlError
from megarl.parallel import terminal
from megarl.parallel.place import LOOPBACK

T = TypeVar("T")

#: Names, in a worker, the file that holds the error which the parent is to raise.
_REPORT = "MEGARL_REPORT"

#: The file, beside that one, that holds the number of the signal which was passed on.
_ASKED = "asked"

#: Signals that a user sends with a key: interrupt and quit.
KEYBOARD = frozenset((signal.SIGINT, signal.SIGQUIT))

#: From linux/prctl.h.
_PR_SET_PDEATHSIG = 1

#: Whether `children_end_with_this_process` was called.
_children_end = False


def launch(function: Callable[..., T], args: tuple[Any, ...], processes: int) -> T:
    """Run `function(*args)` in that many local processes and return rank 0's result.

    One process runs here, in this process. When a worker raises, the others are ended; a `MegarlError` is
    raised again here, the end of a worker by a signal becomes `Interrupted`, and another failure torch's
    `ProcessRaisedException`, which has its traceback.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    # OpenMP allows a list, of which the first is that of the outermost level.
    outermost = os.environ["OMP_NUM_THREADS"].partition(",")[0].strip()
    threads = whole_number({"OMP_NUM_THREADS": outermost}, "OMP_NUM_THREADS")
    if processes == 1:
        return function(*args)

    import torch
    from torch._C._distributed_c10d import TCPStore
    from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, start_processes

    torch.set_num_threads(max(1, threads))
    # The launcher's own log repeats what the exception says, around a sentence that is meant to stand alone.
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.CRITICAL)
    method = "spawn" if torch.cuda.is_available() else "fork"
    result = multiprocessing.get_context(method).SimpleQueue()
    # Held until the last of them has ended. The system chooses the port; nothing here asks for a host's name.
    store = TCPStore(LOOPBACK, 0, is_master=True, wait_for_workers=False)
    place = {
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_RUN_ID": uuid.uuid4().hex,
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    others = multiprocessing.active_children()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "error"
        given = (function, args, place, str(report), result)
        with _stops_forwarded(Path(folder)):
            try:
                started = start_processes(_worker, given, processes, join=False, start_method=method)
                return _result_of(started, result)
            except (ProcessRaisedException, ProcessExitedException) as error:
                if report.is_file():
                    raise pickle.loads(report.read_bytes()) from None
                if (ended := _ended_by_signal(error, Path(folder))) is not None:
                    raise ended from None
                raise
            finally:
                # Some are left where this process was told to end at once.
                for process in multiprocessing.active_children():
                    if process not in others:
                        process.kill()


def _result_of(started: Any, result: Any) -> Any:
    """What the first of the processes sends, once all of them have ended."""
    value = None
    while not started.join(timeout=0.2):
        # One that sends much waits for its reader.
        if not result.empty():
            value = pickle.loads(result.get())
    return value if result.empty() else pickle.loads(result.get())


def _ended_by_signal(error: Any, folder: Path) -> Interrupted | None:
    """The sentence for a process that a signal ended; None for another failure."""
    number = -getattr(error, "exit_code", 0)
    if number <= 0:
        return None
    if number == signal.SIGUSR1 and (asked := folder / _ASKED).is_file():
        name = signal.Signals(int(asked.read_text(encoding="utf-8"))).name
        return Interrupted(f"stopped at {name}, while it started: start it again")
    return Interrupted(
        f"rank {error.error_index}, process {error.error_pid}, was ended by {signal.Signals(number).name}: where that "
        "was not meant, see the system's log for memory that ran out, and start again with resume=auto"
    )


def started_here() -> bool:
    """Whether `launch` started this process, which then speaks for it and passes signals on."""
    return _REPORT in os.environ


def forwarded_signal() -> int | None:
    """The signal that the process which started this one passed on as SIGUSR1; None where it passed on none."""
    if not started_here():
        return None
    asked = Path(os.environ[_REPORT]).with_name(_ASKED)
    return int(asked.read_text(encoding="utf-8")) if asked.is_file() else None


def deliver(error: MegarlError) -> None:
    """Say an error to the user, for all ranks: here, or in the process that started this one."""
    if started_here():
        report = Path(os.environ[_REPORT])
        # Of its own for each call: a second one must not write into what the first one has linked.
        partial = Path(f"{report}.{os.environ['RANK']}.{uuid.uuid4().hex}")
        try:
            partial.write_bytes(pickle.dumps(error))
            os.link(partial, report)
            return
        except FileExistsError:
            # The first one said stays.
            return
        except OSError:
            # No room for the report: said here.
            pass
    error.delivered = True
    terminal.say(str(error))


@contextlib.contextmanager
def _stops_forwarded(folder: Path) -> Iterator[None]:
    """Inside, a signal that asks this process to stop asks the workers, which save what they have and end.

    The second that a user sends from the keyboard ends all of them at once.
    """
    seen: list[int] = []

    def forward(number: int, _: object) -> None:
        name = signal.Signals(number).name
        pressed_before = number in KEYBOARD and not KEYBOARD.isdisjoint(seen)
        seen.append(number)
        started = [int(file.read_text(encoding="utf-8")) for file in folder.glob("started.*")]
        if not started:
            raise Interrupted(f"stopped at {name}, before any process had started")
        if pressed_before:
            raise Interrupted(at_once(name))
        # Which one it was says how much time is left; its own number would come again when the launcher ends a worker.
        with contextlib.suppress(OSError):
            (folder / f"{_ASKED}.partial").write_text(str(number), encoding="utf-8")
            (folder / f"{_ASKED}.partial").replace(folder / _ASKED)
        for pid in started:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR1)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, forward) for number in stop_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_signals() -> list[signal.Signals]:
    """The signals that ask this process to stop: a scheduler's and a terminal's, but for those that it was started with
    to ignore (nohup, a shell's background)."""
    terminals = [number for number in (*KEYBOARD, signal.SIGHUP) if signal.getsignal(number) is not signal.SIG_IGN]
    return [signal.SIGUSR1, signal.SIGTERM, *terminals]


def at_once(name: str) -> str:
    """What is said where a second signal from the keyboard ends a run."""
    return f"ended at once by a second {name}: what was saved before stays, go on with resume=auto"


def _worker(
    rank: int, function: Callable[..., T], args: tuple[Any, ...], place: dict[str, str], report: str, result: Any
) -> None:
    """Run the function; a user-facing error is left in the file `report`, for the parent to print its sentence.

    The process then fails, so that the launcher ends the others, which may be waiting for this one.
    """
    os.environ.update(place, RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ[_REPORT] = report
    _end_with_parent()
    # Forked workers inherit the handlers of the parent. Until a run listens, a stop is the end; a run that watches over
    # its ranks is told nothing by the launcher's SIGTERM, since it names who failed and ends.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    # A terminal sends them to all of its processes: the parent passes them on.
    for number in (*KEYBOARD, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    terminal.keep()
    _wait_for_all(Path(report).parent)
    try:
        value = function(*args)
    except MegarlError as error:
        deliver(error)
        raise
    if rank == 0:
        # By value: what it shares ends with this process.
        result.put(pickle.dumps(value))


def _end_with_parent() -> None:
    """Have the kernel end this process when its parent is gone, so that nothing goes on without anybody who sees it."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def children_end_with_this_process() -> None:
    """From now on have what this process's main thread forks, such as the writers of a save, end when it does.

    A writer whose rank was killed may wait for it for ever, and with what it inherited keep the launcher from seeing
    that the rank is gone.
    """
    global _children_end
    if _children_end:
        return
    _children_end = True
    # Looked up before a fork, in whose child another thread's lock may be held for ever.
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    forks: list[bool] = []

    def note_thread() -> None:
        # The kernel's signal comes at the end of the thread that forked.
        forks[:] = [threading.current_thread() is threading.main_thread()]

    def in_child() -> None:
        if forks == [True]:
            prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    os.register_at_fork(before=note_thread, after_in_child=in_child)


def _wait_for_all(folder: Path) -> None:
    """Wait until every worker is there, before any of them connects to the launcher.

    For each connection a thread of the launcher looks up the peer's name. A worker that is forked in the midst of that
    inherits the resolver's lock without the thread that would release it, and would wait for it for ever.
    """
    own = folder / f"pid.{os.environ['RANK']}"
    own.write_text(str(os.getpid()), encoding="utf-8")
    own.rename(folder / f"started.{os.environ['RANK']}")
    while len(list(folder.glob("started.*"))) < int(os.environ["WORLD_SIZE"]):
        time.sleep(0.01)
