"""A run under watch: the ranks end together, with one message, whatever ends one of them."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import socket
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from megarl.config.health import HealthSettings
from megarl.errors import MegarlError, RankLost, Refusal, with_causes
from megarl.health.stopping import Stopping
from megarl.health.watchdog import Watchdog
from megarl.parallel import progress
from megarl.parallel.bootstrap import World
from megarl.parallel.launch import children_end_with_this_process, deliver, started_here

#: A disk with less bytes than that has no room.
FULL = 1 << 16

#: Seconds in which a rank whose connection broke finds out whose end it was.
PATIENCE = 15.0


class Failed(MegarlError):
    """A rank ended by an error that nobody meant: its traceback is in its log."""

    exit_code = 1


class Guard:
    """What the run asks of its watch. `stopping`: whether it was asked to stop."""

    def __init__(self, stopping: Stopping, watchdog: Watchdog | None, directory: Path) -> None:
        self.stopping, self._watchdog, self._directory = stopping, watchdog, directory

    @contextmanager
    def one_voice(self) -> Iterator[None]:
        """An error that leaves here is said by one rank, and names the rank that it is due to; all ranks end."""
        try:
            yield
        except Exception as error:
            if self._watchdog is None:
                raise
            said = self._named(self._watchdog, error)
            if not self._watchdog.claim(said):
                self._watchdog.leave()
            if said is error:
                raise
            raise said from error

    def end(self, error: MegarlError) -> NoReturn:
        """End the run with that error, said once, from another thread than the one that works."""
        if self._watchdog is None:
            deliver(error)
        elif not self._watchdog.claim(error):
            self._watchdog.leave()
        os._exit(error.exit_code)

    def _named(self, watchdog: Watchdog, error: Exception) -> MegarlError:
        if isinstance(error, RankLost):
            return watchdog.name_the_gone(str(error).partition(". ")[0], PATIENCE)
        if isinstance(error, MegarlError):
            return error
        if (full := disk_is_full(error, self._directory)) is not None:
            return full
        failure = f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]
        if is_broken_connection(error):
            return watchdog.name_the_gone(failure, PATIENCE)
        traceback.print_exception(error)
        where = f"rank {dist.get_rank()} on {socket.gethostname()}"
        return Failed(f"{where} failed in phase {progress.CURRENT.phase} with {failure}; its log has the traceback")


@contextmanager
def watching(
    settings: HealthSettings,
    world: World,
    directory: Path,
    waits: Mapping[str, float],
) -> Iterator[Guard]:
    """Watch over the ranks inside. Collective.

    `directory`: the run's; `waits`: seconds that a rank may wait in a phase for what is no rank, beyond the phase's
    limit.
    """
    stopping = Stopping(settings)
    children_end_with_this_process()
    with stopping.listening():
        if not settings.watchdog:
            yield Guard(stopping, None, directory)
            return
        watchdog = Watchdog(settings, world, directory, stopping, waits)
        watchdog.start()
        if started_here():
            # The launcher's SIGTERM follows the end of another rank. The watchdog, once it watches, names that rank and
            # ends this one.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            yield Guard(stopping, watchdog, directory)
        finally:
            watchdog.stop()


def disk_is_full(error: Exception, directory: Path) -> Refusal | None:
    """The sentence for an error that comes of a full disk under the run's directory; None for another."""
    signs = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT)]
    # Torch's own error of a file may hide the system's, which led to it.
    said = next((sign for one in with_causes(error) for sign in signs if sign in str(one)), None)
    if said is None:
        # Where torch writes a file it does not say why it could not.
        written = isinstance(error, RuntimeError | OSError) and not is_broken_connection(error)
        if not written or _free(directory) >= FULL:
            return None
        said = signs[0]
    return Refusal(
        f"{directory} in phase {progress.CURRENT.phase}: {said}",
        "a run must have room for what it writes; finished checkpoints are as they were",
        "free some space and go on with resume=auto; checkpoint.keep says how many checkpoints are kept",
    )


def _free(directory: Path) -> float:
    """Bytes that can be written there."""
    try:
        return shutil.disk_usage(directory).free
    except OSError:
        return float("inf")


def is_broken_connection(error: Exception) -> bool:
    """Whether an error is what remains of another rank that is gone."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error)
    signs = ("gloo", "Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "TCPStore")
    return isinstance(error, RuntimeError | OSError) and any(sign in text for sign in signs)
