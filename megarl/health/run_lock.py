"""One run in one folder: a lock that names its holder, and that outlives no run for long."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from megarl.errors import Refusal
from megarl.parallel.processes import identity

#: Seconds between two signs of life of a holder, and without one after which it is taken for gone.
REFRESH, PATIENCE = 10.0, 45.0

#: Seconds that a process of this host which was killed may take to be gone.
GOES = 2.0


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a lock. `began`: what tells its process from a later one with the same number.

    `machine`: what numbers of processes are compared within, which a host's name need not tell: containers and machines
    may share one.
    """

    host: str
    machine: str
    pid: int
    began: str
    job: str
    since: str
    token: str

    @classmethod
    def this_process(cls) -> Holder:
        return cls(
            host=socket.gethostname(),
            machine=_machine(),
            pid=os.getpid(),
            began=identity(os.getpid()) or "",
            job=os.environ.get("SLURM_JOB_ID", ""),
            since=time.strftime("%Y-%m-%d %H:%M:%S"),
            token=uuid.uuid4().hex,
        )


class RunLock:
    """The lock of a run's folder, in `directory/lock`.

    A holder that was killed leaves it behind: it is taken over at once where that can be known (its host is this one,
    not started anew since, or it was this Slurm job before it was put back into the queue, or one that Slurm no longer
    runs), and else when it has given no sign of life for `PATIENCE` seconds.
    """

    def __init__(self, directory: Path, say: Callable[[str], None] = lambda _: None) -> None:
        self._file, self._say = directory / "lock", say
        self._own = Holder.this_process()
        self._released = threading.Event()
        self._keeper: threading.Thread | None = None
        # Folders that were not there before, the run's own first.
        self._made: list[Path] = []

    def take(self, lost: Callable[[Refusal], object]) -> None:
        """Become the holder, and give signs of life from now on.

        Raises `Refusal` naming another holder that lives, or where the folder cannot be written; `OSError` where the
        disk is full. `lost` is called in
        another thread where another has taken the lock over, as it may while this process is suspended.
        """
        try:
            self._take()
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise Refusal(
                f"{self._file.parent} on {self._own.host}",
                f"must be a folder that a run can write ({error.strerror or error})",
                "set runs_dir to a place where this user may write",
            ) from None
        self._keeper = threading.Thread(target=self._keep, args=(lost,), daemon=True)
        self._keeper.start()

    def _take(self) -> None:
        folder = self._file.parent
        missing = [one for one in (folder, *folder.parents) if not one.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        self._made = missing
        while not self._create():
            holder = self._holder()
            if holder is None:
                continue
            gone = self._why_gone(holder)
            if gone is None:
                raise self._refusal(holder)
            if self._remove(holder):
                self._say(f"taking over {self._file.parent} from {_name(holder)}, {gone}")

    def _refusal(self, holder: Holder) -> Refusal:
        return Refusal(
            f"{self._file.parent} held by {_name(holder)} since {holder.since}",
            "two runs must not write one folder",
            "wait for it or stop it, or give this run another name",
        )

    def _keep(self, lost: Callable[[Refusal], object]) -> None:
        """Give a sign of life from time to time."""
        while not self._released.wait(REFRESH):
            # A file system that does not answer now may do so the next time.
            with suppress(OSError):
                holder = self._holder()
                # One without a host was not read whole, which says nothing.
                if holder is not None and holder.host and holder.token != self._own.token:
                    lost(self._refusal(holder))
                    return
                if holder is not None or self._create():
                    os.utime(self._file)

    def release(self) -> None:
        """Stop being the holder, where this process is it. A folder made for the lock goes if nothing came into it."""
        self._released.set()
        if self._keeper is not None:
            self._keeper.join()
        with suppress(OSError):
            holder = self._holder()
            if holder is not None and holder.token == self._own.token:
                self._file.unlink(missing_ok=True)
            for folder in self._made:
                folder.rmdir()

    def _create(self) -> bool:
        """Whether the lock was free. It appears with its content, by a link: atomic on shared file systems too."""
        fresh = self._file.with_name(f"lock.{self._own.token}")
        try:
            fresh.write_text(json.dumps(asdict(self._own)), encoding="utf-8")
            os.link(fresh, self._file)
        except FileExistsError:
            return False
        finally:
            fresh.unlink(missing_ok=True)
        return True

    def _remove(self, holder: Holder) -> bool:
        """Remove the lock of a holder that is gone: of several that find it so, one does; nobody removes another's."""
        mark = self._file.with_name(f"lock.{holder.token}.gone")
        try:
            os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            time.sleep(0.1)
            with suppress(FileNotFoundError):
                # Its maker was killed in the two lines below.
                if time.time() - mark.stat().st_mtime > PATIENCE:
                    mark.unlink()
            return False
        try:
            if self._holder() != holder:
                return False
            self._file.unlink(missing_ok=True)
            return True
        finally:
            mark.unlink(missing_ok=True)

    def _holder(self) -> Holder | None:
        """Who holds it now; None where nobody does any more."""
        try:
            # Without a machine: written by a version that did not note it.
            return Holder(**({"machine": ""} | json.loads(self._file.read_text(encoding="utf-8"))))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):
            return Holder("", "", 0, "", "", "an unknown time", "torn")

    def _why_gone(self, holder: Holder) -> str | None:
        """In words why a holder is no more; None where it lives."""
        if not holder.host:
            return "whose lock cannot be read"
        if (holder.host, holder.machine) == (self._own.host, self._own.machine):
            until = time.monotonic() + GOES
            while identity(holder.pid) == holder.began:
                if time.monotonic() > until:
                    return None
                time.sleep(0.05)
            return "which has ended"
        if holder.job and holder.job == self._own.job:
            return "this job before it was put back into the queue"
        if holder.job and _slurm_ended(holder.job):
            return "which Slurm no longer runs"
        return self._silent(holder)

    def _silent(self, holder: Holder) -> str | None:
        """Watch the lock for a sign of life; clocks of other hosts do not matter to that."""
        self._say(f"{self._file} is held by {_name(holder)}: waiting for a sign of life, {PATIENCE:.0f} s")
        until, before = time.monotonic() + PATIENCE, self._stamp()
        while time.monotonic() < until:
            if self._stamp() != before:
                return None
            time.sleep(1.0)
        return f"which gave no sign of life for {PATIENCE:.0f} s"

    def _stamp(self) -> int | None:
        try:
            return self._file.stat().st_mtime_ns
        except FileNotFoundError:
            return None


def _machine() -> str:
    """This boot of this machine, and the container's own numbers of processes."""
    parts: list[str] = []
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return "/".join(parts)


def _slurm_ended(job: str) -> bool:
    """Whether Slurm answers, and says that a job is over."""
    try:
        found = subprocess.run(
            ["squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T"],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    if "Invalid job id" in found.stderr:
        return True
    states = set(found.stdout.split())
    return bool(states) and not states & {"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT"}


def _name(holder: Holder) -> str:
    job = f"job {holder.job}, " if holder.job else ""
    return f"{job}process {holder.pid} on {holder.host}"
