"""Watches over the ranks of a run: one that hangs or dies is named, all leave their stacks, and the run ends in time.

Every rank has two threads beside the one that works. One talks to the store: it says what the rank does (`Beat`), and a
few ranks read what all say and judge. The other looks after the first, for a store that does not answer. The first to
see what is wrong claims the verdict, so that the run ends with one message.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from megarl.config.health import HealthSettings
from megarl.errors import Interrupted, MegarlError
from megarl.health import stacks
from megarl.health.beats import Beats
from megarl.health.judgement import Verdict, judge
from megarl.health.phase_mark import PhaseMark, forget
from megarl.health.stopping import Stopping
from megarl.parallel import progress, roll_call
from megarl.parallel.bootstrap import World
from megarl.parallel.launch import deliver

#: Most ranks that read what all ranks say, spread over the world.
WATCHERS = 8

#: Times in a row that a watcher must see the same rank stand still.
LOOKS = 3

#: Seconds for the other ranks to hear of the verdict before the store's host ends.
FAREWELL = 5.0

#: Seconds that a rank may take to end after it has said why the run does.
LAST_WORDS = 60.0

_RETRY = "Nothing that was saved is lost: start again with resume=auto"


class Watchdog:
    """One rank's watch; arguments as for `megarl.health.guard.watching`."""

    def __init__(
        self,
        settings: HealthSettings,
        world: World,
        directory: Path,
        stopping: Stopping,
        waits: Mapping[str, float],
    ) -> None:
        self._settings, self._directory, self._stopping = settings, directory, stopping
        self._rank, self._size, self._host, self._pid = world.rank, world.size, socket.gethostname(), os.getpid()
        self._store = _own_connection()
        node = world.node_of_rank[world.rank]
        neighbours = [rank for rank in range(world.size) if world.node_of_rank[rank] == node]
        self._watches = world.rank % -(-world.size // WATCHERS) == 0
        # That a process is gone, its own host sees at once.
        self._looks_at = range(world.size) if self._watches else neighbours
        # Without the store, which is rank 0's as a rule, a host has one voice.
        self._speaks_for_host = world.rank == next((rank for rank in neighbours if rank > 0), 0)
        self._mark = PhaseMark()
        self._mark.set(progress.CURRENT.phase)
        self._left = threading.Event()
        self._beats = Beats(self._store, settings, world.rank, waits, self._left)
        self._wake = threading.Event()
        # Set where this rank says why the run ends: the time until which it may take to end.
        self._until = float("inf")
        self._code = Interrupted.exit_code
        self._talked = time.monotonic()
        # The last verdict in short, and how often in a row it was seen.
        self._suspicion: Any = None
        self._times = 0
        # When this rank first found that another says why the run ends.
        self._outdone: float | None = None
        self._ending = threading.Lock()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._talk, self._look_after)]

    def start(self) -> None:
        """Begin to watch. Collective: all ranks have said something before any of them judges."""
        # Also without the interpreter's lock, which a hanging rank may hold, a process can be asked for its stacks.
        faulthandler.register(signal.SIGUSR2, file=2, all_threads=True)
        progress.tick()
        self._beats.say()
        # Nobody watches yet: a barrier would wait for a rank that stopped on its way here.
        limit = self._settings.join_limit
        said = f"{limit:g} s (health.join_limit) after all had joined"
        try:
            roll_call.call(PrefixStore("start", self._store), self._rank, self._size, said, time.monotonic() + limit)
            # Who stops at once is known from now on: the process of the store's host too, which then tells no more.
            self._beats.hear(self._looks_at)
        except RuntimeError:
            raise Interrupted(f"{self._store_gone()}. {_RETRY}") from None
        progress.CURRENT.on_enter = self._on_enter
        for thread in self._threads:
            thread.start()

    def _on_enter(self) -> None:
        self._mark.set(progress.CURRENT.phase)
        self._wake.set()

    def stop(self) -> None:
        """End the watch: this rank leaves by itself."""
        self._left.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(2 * self._settings.interval)
        with contextlib.suppress(RuntimeError):
            self._beats.say()
            if self._until == float("inf"):
                self._wait_for_others()
        progress.CURRENT.on_enter = lambda: None
        self._mark.remove()

    def _wait_for_others(self) -> None:
        """Leave together: who is gone, with its connections, while another still ends, would look like a failure."""
        left, until = self._store.add("left", 1), time.monotonic() + FAREWELL
        while left < self._size and time.monotonic() < until and not self._store.check(["claim"]):
            time.sleep(0.02)
            left = self._store.add("left", 0)

    def claim(self, error: MegarlError) -> bool:
        """Say `error` for all ranks; whether this rank is the one that does. False: another says why the run ends.

        An error that all ranks raise is said once; for one that a single rank raises, the others end with its code.
        """
        try:
            if not self._take_verdict():
                return False
        except RuntimeError:
            return self._claim_without_store(error)
        self._until, self._code = time.monotonic() + LAST_WORDS, error.exit_code
        deliver(error)
        self._publish({"code": error.exit_code, "folder": None, "pids": [], "hearing": self._size})
        self._wait_until_heard(self._size if self._rank == 0 else 1)
        return True

    def _claim_without_store(self, error: MegarlError) -> bool:
        """`claim` where the store is gone: one rank of each host speaks, the others end here."""
        # `_look_after` may be about to say that there is no answer: it then ends this process.
        self._ending.acquire()
        if not self._speaks_for_host:
            os._exit(error.exit_code)
        self._until, self._code = time.monotonic() + LAST_WORDS, error.exit_code
        deliver(error)
        return True

    def leave(self) -> NoReturn:
        """End this process as the verdict says that another rank has claimed."""
        until = time.monotonic() + 2 * FAREWELL
        with contextlib.suppress(RuntimeError):
            # Not the store's own wait: it would keep this rank's other threads from the store, one of which may be
            # about to publish the verdict.
            while time.monotonic() < until:
                if self._store.check(["verdict"]):
                    self._end(json.loads(self._store.get("verdict")))
                time.sleep(0.05)
        os._exit(Interrupted.exit_code)

    def name_the_gone(self, failure: str, patience: float) -> Interrupted:
        """The error of a collective that broke with `failure`: who died or fell silent within `patience` seconds."""
        until = time.monotonic() + patience
        silence = min(self._settings.silence, max(5.0, 5 * self._settings.interval))
        try:
            while time.monotonic() < until and not self._store.check(["verdict"]):
                self._beats.hear(range(self._size))
                verdict = judge([seen for seen in self._beats.seen() if seen.beat.rank != self._rank], silence)
                if verdict is not None and verdict.cause in ("died", "silent"):
                    return Interrupted(f"{verdict.sentence()}. {_RETRY}")
                time.sleep(min(0.5, self._settings.interval))
        except RuntimeError:
            return Interrupted(f"{self._store_gone()}. {_RETRY}")
        return Interrupted(
            f"rank {self._rank} lost another one in phase {progress.CURRENT.phase} ({failure}). {_RETRY}"
        )

    def _talk(self) -> None:
        """The thread that speaks and listens."""
        while not self._left.is_set():
            if self._wake.wait(self._settings.interval):
                self._wake.clear()
            pause = time.monotonic() - self._talked - self._settings.interval
            if pause > 5 + 2 * self._settings.interval:
                # This process itself stood still, perhaps with all others: what was not heard meanwhile says nothing.
                self._beats.excuse(pause)
            # Without the store: `_look_after` gives it time, and ends the run.
            with contextlib.suppress(RuntimeError):
                self._talk_once()
                self._talked = time.monotonic()

    def _talk_once(self) -> None:
        self._beats.say()
        if self._stopping.requested and not self._store.check(["stop"]):
            self._store.set("stop", json.dumps([self._stopping.reason, self._stopping.seconds_left]))
        if not self._stopping.requested and self._store.check(["stop"]):
            self._stopping.request(*json.loads(self._store.get("stop")))
        ended = self._store.check(["verdict"])
        # After the verdict is looked for: this rank may have just claimed it, and then ends by itself.
        if self._until < float("inf"):
            return
        if ended:
            self._end(json.loads(self._store.get("verdict")))
        self._beats.hear(self._looks_at)
        verdict = judge(self._beats.seen(), self._settings.silence)
        if verdict is None:
            self._suspicion = None
            return
        if not self._is_sure(verdict):
            return
        if self._take_verdict():
            self._pronounce(verdict)
        self._outdone = self._outdone or time.monotonic()
        if time.monotonic() - self._outdone > 2 * FAREWELL and self._take_verdict("claim again"):
            # Who was to say it has ended before it could.
            self._pronounce(verdict)

    def _pronounce(self, verdict: Verdict) -> NoReturn:
        """Say a verdict for all ranks, and end with them."""
        folder = self._directory / f"hang-{int(time.time())}"
        deliver(Interrupted(f"{verdict.sentence()}. The stacks of the ranks are in {folder}. {_RETRY}"))
        # Who works or waits has a watchdog of its own that ends it.
        silent = verdict.culprits if verdict.cause == "silent" else ()
        pids = [[beat.host, beat.pid] for beat in silent]
        deaf = 0 if verdict.cause in ("stuck", "deadlock") else len(verdict.culprits)
        for beat in verdict.culprits if verdict.cause == "died" else ():
            if beat.host == self._host:
                forget(beat.pid)
        code = Interrupted.exit_code
        self._publish({"code": code, "folder": str(folder), "pids": pids, "hearing": self._size - deaf})
        self._end(json.loads(self._store.get("verdict")))

    def _is_sure(self, verdict: Verdict) -> bool:
        """Whether to act on a verdict: what may be the wait of a moment must be seen again and again."""
        found = verdict.cause, [(beat.rank, beat.number) for beat in verdict.culprits]
        self._times = self._times + 1 if found == self._suspicion else 1
        self._suspicion = found
        if not (self._watches or verdict.cause == "died"):
            return False
        return verdict.cause in ("died", "silent") or self._times >= LOOKS

    def _look_after(self) -> None:
        """The thread that notices a store which does not answer: its host hangs, died, or is cut off."""
        last = time.monotonic()
        while not self._left.wait(self._settings.interval):
            now = time.monotonic()
            if now > self._until:
                os._exit(self._code)
            if now - last > 5 + 2 * self._settings.interval:
                self._talked = now
            last = now
            if now - self._talked < self._settings.silence or not self._ending.acquire(blocking=False):
                continue
            stacks.dump(self._directory / "hang-store" / _file_name(self._rank), self._heading())
            if self._speaks_for_host:
                deliver(Interrupted(self._store_away(now - self._talked)))
                host = self._beats.last(0)
                if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and host is not None:
                    self._end_stopped([host.pid] if host.host == self._host else [])
            os._exit(Interrupted.exit_code)

    def _store_away(self, seconds: float) -> str:
        store = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        return (
            f"rank {self._rank} on {self._host} in phase {progress.CURRENT.phase} had no answer from the ranks' store "
            f"at {store} for {seconds:.0f} s (health.silence): rank 0's host hangs, is gone or is cut off. {_RETRY}"
        )

    def _store_gone(self) -> str:
        """Whose end it was that closed the connection to the store."""
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return f"the launcher on {os.environ.get('MASTER_ADDR')}, which held the ranks' store, has ended"
        host = self._beats.last(0)
        if host is None:
            return f"rank 0 at {os.environ.get('MASTER_ADDR')}, which held the ranks' store, has ended"
        return f"rank 0 on {host.host}, which held the ranks' store, has ended in phase {host.phase}"

    def _take_verdict(self, key: str = "claim") -> bool:
        """Whether this call is the one of all ranks, and of this rank's threads, that says why the run ends."""
        own = f"{self._rank}/{threading.get_ident()}"
        return self._store.compare_set(key, "", own).decode() == own

    def _publish(self, verdict: dict[str, Any]) -> None:
        self._store.set("verdict", json.dumps(verdict))

    def _wait_until_heard(self, others: int) -> None:
        """Count this rank among those that know why the run ends, and wait for `others`: for their stacks, and because
        rank 0, whose store it may be, goes last."""
        with contextlib.suppress(RuntimeError):
            heard, until = self._store.add("heard", 1), time.monotonic() + FAREWELL
            while heard < others and time.monotonic() < until:
                time.sleep(0.05)
                heard = self._store.add("heard", 0)

    def _end(self, verdict: dict[str, Any]) -> NoReturn:
        """End this process: stacks first where a rank hangs; the processes of this host that are stopped go too."""
        with self._ending:
            if verdict["folder"] is not None:
                stacks.dump(Path(verdict["folder"]) / _file_name(self._rank), self._heading())
            waits = verdict["folder"] is not None or self._rank == 0
            self._wait_until_heard(verdict["hearing"] if waits else 1)
            self._end_stopped(pid for host, pid in verdict["pids"] if host == self._host and pid != self._pid)
            forget(self._pid)
            os._exit(verdict["code"])

    def _end_stopped(self, pids: Iterable[int]) -> None:
        """End processes of this host that cannot do it themselves; their stacks go to their logs if they still can."""
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGUSR2)
                time.sleep(0.3)
                os.kill(pid, signal.SIGKILL)
            forget(pid)

    def _heading(self) -> str:
        now, stand = progress.CURRENT, stacks.stand_of_main_thread()
        waits = f", waits for other ranks in {stand.waits_in}" if stand.waits_in else ""
        idle = time.monotonic() - now.moved
        return (
            f"rank {self._rank} on {self._host}: phase {now.phase}, no progress for {idle:.1f} s, at {stand.at}{waits}"
        )


def _own_connection() -> Store:
    """A connection to the world's store beside that of the working thread, which may be waiting on its own."""
    store: Any = dist.distributed_c10d._get_default_store()
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    return PrefixStore("megarl/watchdog/" + roll_call.launch_key(), store.clone())


def _file_name(rank: int) -> str:
    return f"rank_{rank:04d}.txt"
