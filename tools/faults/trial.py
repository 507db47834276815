"""One fault: a run that meets it, what is left then, and the same command again."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from faults import damage, deeds, places, process, runs, verdict
from faults.plan import AT_REST, Fault
from faults.process import Started
from faults.runs import Halfway, Reference
from faults.verdict import Seen

#: Seconds for a run to come to its moment, and beyond its limit to be taken for hanging.
TO_THE_MOMENT, PATIENCE = 150.0, 60.0

DISK_MEBIBYTES = 64

#: Free on a disk that is too full for a checkpoint, but not for a line of metrics.
TOO_LITTLE = 256 << 10


class Trial:
    """`say` is told what is being done."""

    def __init__(self, fault: Fault, reference: Reference, halfway: Halfway, say: Callable[[str], None]) -> None:
        self.fault, self._reference, self._halfway, self._say = fault, reference, halfway, say
        self._folder = reference.folder
        self._logs = self._folder / "logs" / fault.name
        self._note = self._logs / "fault.json"
        self._runs = self._folder / "runs"
        self.seen = Seen.of(fault)

    @property
    def _run(self) -> Path:
        return self._runs / self.fault.name

    def make(self) -> Seen:
        """Let it happen. The run's folder is kept where the outcome is not good; its logs and stacks always."""
        shutil.rmtree(self._logs, ignore_errors=True)
        shutil.rmtree(self._run, ignore_errors=True)
        self._logs.mkdir(parents=True)
        if self.fault.kind in AT_REST:
            self._at_rest()
        elif self.fault.kind.startswith("disk"):
            with places.small_disk(self._folder / "disks" / self.fault.name, DISK_MEBIBYTES) as disk:
                self._runs = disk
                self._in_motion()
        else:
            self._in_motion()
        verdict.judge(self.fault, self.seen)
        if self.seen.outcome in verdict.GOOD:
            shutil.rmtree(self._run, ignore_errors=True)
        return self.seen

    # --- a fault of a run under way ---

    def _in_motion(self) -> None:
        fault, seen = self.fault, self.seen
        trigger = deeds.Trigger(
            self._moment(), self._deed(), self._note, self._run / "checkpoints", main=fault.kind == "stall"
        )
        with self._started("fault", trigger.install) as started:
            self._watch(started)
        seen.said = [verdict.last_words(one.text()) for one in started]
        seen.code, seen.complete = self._code(started), (self._run / "summary.json").is_file()
        seen.traceback = any("Traceback (most recent call last)" in one.text() for one in started)
        seen.lost = verdict.lost(self._run, seen.note.get("finished", []))
        (self._runs / "filler").unlink(missing_ok=True)
        self._resume()

    def _code(self, started: list[Started]) -> int | None:
        """The code that a scheduler would see: of the ranks apart, of one that was not killed."""
        codes = [one.code for one in started]
        return next((code for code in codes if code not in (0, -9)), codes[0])

    def _moment(self) -> deeds.Moment:
        fault = self.fault
        lengths = self._reference.entries(fault.rank, fault.phase)
        which = list(range(len(lengths)))
        if fault.kind == "reward":
            # Where answers wait for the grader; the other entries are too short to find it at work.
            which = [nth for nth in which if lengths[nth] >= max(lengths) / 2]
        nth = which[min(int(fault.entry * len(which)), len(which) - 1)]
        delay = 0.0 if fault.kind == "disk-full" and fault.phase == "save" else fault.delay * lengths[nth]
        return deeds.Moment(fault.phase, fault.rank, nth + 1, delay)

    def _deed(self) -> Callable[[], None]:
        kind = self.fault.kind
        made = {
            "kill": deeds.signal_self(signal.SIGKILL),
            "hang": deeds.signal_self(signal.SIGSTOP),
            "stall": deeds.stall,
            "term": deeds.signal_launcher(signal.SIGTERM),
            "usr1": deeds.signal_launcher(signal.SIGUSR1),
            "launcher": deeds.signal_launcher(signal.SIGKILL),
            "group": deeds.kill_group,
            "network": deeds.cut_network,
            "reward": deeds.kill_grader,
            "disk-short": deeds.fill(self._runs, TOO_LITTLE, saving=False),
            "disk-full": deeds.fill(self._runs, 0, saving=self.fault.phase == "save"),
        }
        return made[kind]

    def _watch(self, started: list[Started]) -> None:
        """Wait for the fault, and for the end that it brings."""
        began, seen = time.time(), self.seen

        def too_long() -> bool:
            if not seen.note and self._note.is_file():
                seen.note = json.loads(self._note.read_text(encoding="utf-8"))
                seen.limit = verdict.limit_of(self.fault, seen.note["watched"])
                self._say(f"happened after {seen.note['at'] - began:.0f} s; waiting for the end")
            if not seen.note:
                return time.time() - began > TO_THE_MOMENT
            self._end_the_stopped(started)
            return time.time() - seen.note["at"] > seen.limit + PATIENCE

        seen.ended = process.wait(started, too_long)
        too_long()
        if not seen.note:
            seen.note = {"rank": self.fault.rank, "phase": "", "before": "", "since": 0.0, "watched": False}
            seen.note |= {"finished": [], "at": began}
            seen.ended = False
        seen.seconds = max(one.ended or time.time() for one in started) - seen.note["at"]
        seen.left_over = sum(len(one.left_over()) for one in started)

    def _end_the_stopped(self, started: list[Started]) -> None:
        """Where all other hosts have ended, do with a rank that is stopped what its own host does.

        It cannot end itself, and no other host can: srun --kill-on-bad-exit and torchrun's agent do.
        """
        if self.fault.kind != "hang" or self.fault.world != "apart":
            return
        stopped = started[self.fault.rank]
        if stopped.code is None and all(one.code is not None for one in started if one is not stopped):
            os.kill(stopped.pid, signal.SIGKILL)

    # --- damage at rest ---

    def _at_rest(self) -> None:
        fault, seen = self.fault, self.seen
        shutil.copytree(self._halfway.run, self._run)
        shutil.rmtree(self._run.with_suffix(".saved"), ignore_errors=True)
        hit, words = damage.damage(self._run, fault.kind, fault.phase, fault.draw)
        names = deeds.finished(self._run / "checkpoints")
        seen.note = {"damaged": words, "at": time.time(), "finished": names}
        seen.limit = verdict.limit_of(fault, True)
        with self._started("fault") as started:
            seen.ended = process.wait(started, lambda: time.time() - seen.note["at"] > seen.limit + PATIENCE)
        text = started[0].text()
        seen.code, seen.said = started[0].code, [verdict.last_words(text)]
        seen.seconds, seen.traceback = started[0].ended - seen.note["at"], "Traceback (most recent" in text
        if fault.kind == "all-damaged":
            damage.restore(self._run)
            seen.lost = verdict.lost(self._run, names)
            self._resume()
            return
        # What was whole is what the run went on from.
        whole = [name for name in names if name not in hit]
        step = int(whole[-1].removeprefix("step_"))
        plain = " ".join(text.split())
        if f"continuing after step {step}" not in plain:
            seen.lost = whole
        if fault.phase == "newest" and fault.kind != "no-latest" and seen.code == 0:
            seen.names_right = hit[-1] in plain
        seen.resume_code, seen.resume_said = seen.code, seen.said[0]
        seen.differs = self._reference.differs(self._run)
        shutil.rmtree(self._run.with_suffix(".saved"), ignore_errors=True)

    # --- the same again ---

    def _resume(self) -> None:
        """Go on without a fault, and compare."""
        self._say("going on")
        began = time.time()
        with self._started("resume") as started:
            process.wait(started, lambda: time.time() - began > verdict.WHOLE_RUN + PATIENCE)
        self.seen.resume_code = next((one.code for one in started if one.code != 0), 0)
        self.seen.resume_seconds = max(one.ended for one in started) - began
        self.seen.resume_said = " / ".join(verdict.last_words(one.text()) for one in started)
        if self.seen.resume_code == 0:
            self.seen.differs = self._reference.differs(self._run)
            self.seen.lost += verdict.lost(self._run, deeds.finished(self._run / "checkpoints"))

    @contextlib.contextmanager
    def _started(self, name: str, prepare: Callable[[], None] = lambda: None) -> Iterator[list[Started]]:
        """A run in its world, which is taken down after it."""
        settings = [f"runs_dir={self._runs}"]
        if self.fault.kind.startswith("disk"):
            settings.append("health.preflight.disk_free_gib=0")
        with places.two_hosts() if self.fault.world == "apart" else contextlib.nullcontext() as hosts:
            started = runs.start(
                self._folder,
                self.fault.world,
                self.fault.name,
                self._logs / f"{name}.log",
                *settings,
                hosts=hosts,
                prepare=prepare,
            )
            try:
                yield started
            finally:
                for one in started:
                    one.kill()
                for stacks in self._run.glob("hang-*"):
                    shutil.copytree(stacks, self._logs / name / stacks.name, dirs_exist_ok=True)
