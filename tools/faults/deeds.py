"""What a fault does, done by a rank of the run to itself or around it, at a known moment in the real code.

A run's processes are forked from the campaign's, so what is put in place there before the command line's `main` is in
place in all ranks: here the function that says which phase begins.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

#: Not a phase, but the moment at which a rank has joined the others, and nobody watches over it yet.
JOINED = "joined"

#: Seconds for a save to begin to write.
BEGINS = 3.0
#: Bytes at a time of what fills a disk. A piece that finds no room is given back: the disk is full for a moment alone.
PIECES = (1 << 20, 1 << 16, 1 << 12)


@dataclass(frozen=True)
class Moment:
    """`delay` seconds after `rank` enters `phase` for the `entry`-th time (from 1); at the latest as it leaves it."""

    phase: str
    rank: int
    entry: int
    delay: float


def trace(folder: Path) -> None:
    """Have each rank write which phases it enters, and when, to folder/rank_N.jsonl."""
    from megarl.parallel import progress

    before = progress.enter

    def enter(phase: str) -> None:
        before(phase)
        with open(folder / f"rank_{_rank()}.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps([phase, time.time()]) + "\n")

    progress.enter = enter


class Trigger:
    """Does a deed at a moment, after writing to `note` where the rank was and which checkpoints were finished."""

    def __init__(self, moment: Moment, deed: Callable[[], None], note: Path, checkpoints: Path, *, main: bool) -> None:
        self._moment, self._deed, self._note, self._checkpoints = moment, deed, note, checkpoints
        # Whether the deed is the working thread's own.
        self._main = main
        self._entries, self._entered, self._before = 0, 0.0, ""
        self._armed = False
        self._once = threading.Lock()

    def install(self) -> None:
        """Take the place of the function that says which phase begins."""
        from megarl.parallel import bootstrap, progress
        from megarl.parallel.bootstrap import World

        self._progress, self._enter, self._unwatched = progress.CURRENT, progress.enter, progress.CURRENT.on_enter
        progress.enter = self.enter
        if self._moment.phase == JOINED:
            join = bootstrap.join

            def join_and_fire(**limits: float) -> World:
                world = join(**limits)
                if world.rank == self._moment.rank:
                    self._entered = time.monotonic()
                    self._fire()
                return world

            bootstrap.join = join_and_fire

    def enter(self, phase: str) -> None:
        """Say which phase begins, and see whether the moment has come."""
        if self._armed:
            self._fire()
        before = self._progress.phase
        self._enter(phase)
        if _rank() != self._moment.rank or phase != self._moment.phase:
            return
        self._entries += 1
        if self._entries == self._moment.entry:
            self._before, self._entered, self._armed = before, time.monotonic(), True
            self._wait()

    def _wait(self) -> None:
        if self._main:
            signal.signal(signal.SIGALRM, lambda *_: self._fire())
            signal.setitimer(signal.ITIMER_REAL, max(0.001, self._moment.delay))
            return
        timer = threading.Timer(self._moment.delay, self._fire)
        timer.daemon = True
        timer.start()

    def _fire(self) -> None:
        # The timer and the end of the phase may come together.
        if not self._once.acquire(blocking=False):
            if not self._main:
                time.sleep(BEGINS)
            return
        self._armed = False
        self._write()
        self._deed()

    def _write(self) -> None:
        found = {
            "rank": _rank(),
            "phase": self._progress.phase,
            "before": self._before,
            "since": time.monotonic() - self._entered,
            "watched": self._progress.on_enter is not self._unwatched,
            "finished": finished(self._checkpoints),
            "at": time.time(),
        }
        partial = self._note.with_suffix(".partial")
        partial.write_text(json.dumps(found), encoding="utf-8")
        partial.rename(self._note)


def finished(checkpoints: Path) -> list[str]:
    """The finished checkpoints that are there."""
    return sorted(one.name for one in checkpoints.glob("step_*") if one.name.removeprefix("step_").isdigit())


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


# --- deeds -----------------------------------------------------------------------------------------------------------


def signal_self(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def signal_launcher(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getppid(), number)


def kill_group() -> None:
    os.killpg(0, signal.SIGKILL)


def stall() -> None:
    """Do nothing for ever, in the thread that works; the others go on."""
    while True:
        time.sleep(3600)


def fill(disk: Path, leave: int, *, saving: bool) -> Callable[[], None]:
    """Have another program take the disk but for `leave` bytes; `saving`: once a save has begun to write."""

    def deed() -> None:
        until = time.monotonic() + BEGINS
        while saving and time.monotonic() < until and not list(disk.glob("**/step_*.partial/*")):
            time.sleep(0.0005)
        with open(disk / "filler", "wb") as file:
            for piece in PIECES:
                while _taken(file.fileno(), disk, leave, piece):
                    pass

    return deed


def _taken(file: int, disk: Path, leave: int, piece: int) -> bool:
    """Have a file grow by `piece` bytes; false where less than that is free beside what is left."""
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    try:
        if free >= leave + piece:
            os.posix_fallocate(file, os.fstat(file).st_size, piece)
            return True
    except OSError as error:
        # The run has written meanwhile.
        if error.errno != errno.ENOSPC:
            raise
    return False


def cut_network() -> None:
    """Take down this host's end of the link."""
    subprocess.run(["ip", "link", "set", "eth0", "down"], check=True)


def kill_grader() -> None:
    """SIGKILL for the grading processes of this rank."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if parent == os.getpid() and b"megarl.rewards.worker" in command:
            os.kill(int(folder.name), signal.SIGKILL)
