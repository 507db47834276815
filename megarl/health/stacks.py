"""Where a process stands: whether its working thread waits for other ranks, and in what; and all stacks, in a file."""

from __future__ import annotations

import contextlib
import faulthandler
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import NamedTuple

#: A thread whose innermost frame of interest is in one of these waits for other ranks.
_WAITING = (
    "torch/distributed/",
    "megatron/core/pipeline_parallel/p2p_communication.py",
    "megatron/core/tensor_parallel/mappings.py",
    "vllm/distributed/",
    "megarl/weights/transfer.py",
    "megarl/parallel/absence.py",
)
#: Frames that pass a call on: they say nothing of what is being done.
_PASSING = ("torch/distributed/c10d_logger.py", "megarl/parallel/cpu_platform.py")


class Stand(NamedTuple):
    """Where a thread is. `waits_in`: the call that waits for other ranks, None where it works; `at`: the innermost line
    of megarl, or of the program where there is none of megarl."""

    waits_in: str | None
    at: str


def stand_of_main_thread() -> Stand:
    """Where this process's working thread is at this moment."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return stand_of(frame)


def stand_of(frame: FrameType | None) -> Stand:
    """Where the thread with this innermost frame is."""
    waits_in: str | None = None
    decided = False
    for one in _outward(frame):
        file = one.f_code.co_filename.replace("\\", "/")
        if any(file.endswith(name) for name in _PASSING) or (_is_plain_torch(file) and not decided):
            continue
        waiting = any(name in file for name in _WAITING)
        if waiting and (not decided or waits_in is not None):
            # The outermost of the calls into one library is the one that was made.
            waits_in = one.f_code.co_name
        elif decided or not waiting:
            break
        decided = True
    return Stand(waits_in, _line_of_interest(frame))


def _outward(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_plain_torch(file: str) -> bool:
    return "/torch/" in file and "/torch/distributed/" not in file


def _line_of_interest(frame: FrameType | None) -> str:
    frames = list(_outward(frame))
    own = (one for one in frames if "/megarl/" in one.f_code.co_filename and "/parallel/" not in one.f_code.co_filename)
    found = next(own, frames[0] if frames else None)
    if found is None:
        return "nowhere"
    _, package, inside = found.f_code.co_filename.rpartition("/megarl/")
    place = package[1:] + inside if package else "/".join(Path(found.f_code.co_filename).parts[-2:])
    return f"{place}:{found.f_lineno} {found.f_code.co_name}"


def dump(file: Path, heading: str) -> None:
    """Write the stacks of all threads to `file`, below `heading`. A full disk keeps no run from ending."""
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "w", encoding="utf-8") as handle:
            handle.write(heading + "\n\n")
            handle.flush()
            faulthandler.dump_traceback(handle, all_threads=True)
