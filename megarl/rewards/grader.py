"""Rewards of responses, computed in worker processes that may hang or die without hurting the run."""

from __future__ import annotations

import json
import select
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NoReturn

from megarl.config.rewards import BUILTIN_KINDS, RULE_KINDS, ScoreSettings
from megarl.errors import MegarlError, Refusal, ScoringStopped
from megarl.parallel import progress
from megarl.rewards.answers import GradedAnswer, GradingItem, scaled
from megarl.rewards.process import GradingProcess
from megarl.rewards.text import token_f1
from megarl.servers.failures import Failures

#: Seconds that a function's first call may take, which may load what later ones use. Our choice.
FIRST_CALL_LIMIT = 30.0
#: Processes that may end in a row before they are ready, before the grader gives up.
MAX_FAILED_STARTS = 3
#: Counts answers whose grading process ended.
DIED = "grader_died"
TIMEOUT, ERROR, OUT_OF_RANGE = "grader_timeout", "grader_error", "reward_out_of_range"


@dataclass(frozen=True, slots=True)
class _Failure:
    """How the reward failed on an answer, which is counted as `counter`; `seen` continues a sentence about it."""

    counter: str
    seen: str


class Grader:
    """Grades responses in `settings.workers` processes of its own, started at construction.

    An answer that hangs, kills its process or raises costs that answer its reward and is counted; the process
    is replaced. Past a share of such answers it stops. Nothing of an answer is parsed in this process; f1, which only
    counts words, is decided at once. Use as a context manager, or `close()`.

    Each process calls a function of the user's own with `trial` first. `section` names the settings.

    Raises `Refusal` where `reward.kind` is not built in and cannot be imported, where its first call gives no number in
    its range, or low is not below high.
    """

    def __init__(self, settings: ScoreSettings, section: str = "reward", trial: GradingItem | None = None) -> None:
        if not settings.low < settings.high:
            raise Refusal(
                f"{section}.low={settings.low}", f"must be below {section}.high={settings.high}", "swap or widen them"
            )
        self._settings = settings
        self._section = section
        builtin = settings.kind in BUILTIN_KINDS
        self._trial = None if builtin else trial
        self._failures = Failures(
            f"{section}.kind={settings.kind} failed on",
            f"{section}.max_failed_share",
            settings.max_failed_share,
            {
                TIMEOUT: f"make it faster, or raise {section}.time_limit",
                DIED: "see what ends its processes, such as memory that runs out",
                ERROR: "correct it",
                OUT_OF_RANGE: f"set {section}.low and {section}.high to its range",
            },
        )
        self._failed_starts = 0
        self._begun = False
        """Whether a worker was ready once."""
        self._workers: list[GradingProcess] = []
        self._closed = False
        if settings.kind == "f1":
            return
        # One process compares more boxes than engines write.
        self._workers = [self._start() for _ in range(1 if settings.kind == "boxed" else settings.workers)]
        if not builtin:
            self._await_first_worker()  # a function of no use is refused here, not after the first generation

    def __enter__(self) -> Grader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all worker processes. May be called more than once."""
        self._closed = True
        for worker in self._workers:
            worker.kill()
        self._workers = []

    def grade(self, items: Sequence[GradingItem]) -> list[GradedAnswer]:
        """Rewards of `items`, in their order.

        Raises `ScoringStopped` where the reward fails on too many of them, or no worker can be started any more.
        """
        if self._closed:
            raise MegarlError("The grader is closed.")
        for position, worker in enumerate(self._workers):
            if worker.item is not None:  # an earlier call was interrupted: its answer must not be taken for one of ours
                self._replace(position)
        graded = {index: answer for index, item in enumerate(items) if (answer := self._decide(item)) is not None}
        waiting = deque(index for index in range(len(items)) if index not in graded)
        again: set[int] = set()
        self._failures.begin(len(items))
        while len(graded) < len(items):
            for position, worker in enumerate(self._workers):
                if not (waiting and worker.ready and worker.item is None):
                    continue
                index = waiting.popleft()
                if not worker.assign(index, _request(items[index]), self._settings.time_limit):
                    # It died while idle: that is not this answer's fault.
                    waiting.appendleft(index)
                    self._replace(position)
            for index, found in self._collect():
                if isinstance(found, _Failure) and found.counter == DIED and index not in again:
                    # Perhaps somebody else killed its process: an answer that kills every one does so twice.
                    again.add(index)
                    waiting.appendleft(index)
                    continue
                progress.tick()
                if isinstance(found, _Failure):
                    self._failures.note(found.counter, found.seen)
                    graded[index] = GradedAnswer(self._settings.low, found.counter)
                else:
                    graded[index] = found
        self._failures.end()
        return [graded[index] for index in range(len(items))]

    def begin_step(self) -> None:
        """Nothing here is bounded per step."""

    def take_counters(self) -> dict[str, int]:
        """Empty: everything is counted with the answer it happened to."""
        return {}

    def take_first_failure(self) -> str | None:
        """A sentence about the first failure, once."""
        return self._failures.take_first()

    def _decide(self, item: GradingItem) -> GradedAnswer | None:
        """The reward of what is decided without a worker, else None."""
        if self._settings.kind != "f1":
            return None
        share = max(token_f1(item.text, reference) for reference in item.references)
        return GradedAnswer(scaled(share, self._settings.low, self._settings.high))

    def _collect(self) -> list[tuple[int, GradedAnswer | _Failure]]:
        """Wait for the next message or deadline; returns (item number, grade or failure) of what ended by it."""
        timeout = max(0.0, min(worker.deadline.at for worker in self._busy()) - time.monotonic())
        pipes = {worker.stdout.fileno(): position for position, worker in enumerate(self._workers)}
        poll = select.poll()
        for pipe in pipes:
            poll.register(pipe, select.POLLIN)
        finished: list[tuple[int, GradedAnswer | _Failure]] = []
        for pipe, _ in poll.poll(timeout * 1000 + 1):
            position = pipes[pipe]
            worker, item = self._workers[position], self._workers[position].item
            try:
                messages = worker.receive()
            except (EOFError, json.JSONDecodeError):
                self._replace(position)
                if item is not None:
                    finished.append((item, _Failure(DIED, f"ended its process ({worker.ended()})")))
                continue
            for message in messages:
                if item is None:
                    self._note_start(worker, message)
                else:
                    worker.item = None
                    finished.append((item, self._graded(message)))
        for position, worker in enumerate(self._workers):
            if worker in self._busy() and worker.deadline.passed():
                late = _Failure(TIMEOUT, f"gave no result within {worker.deadline.seconds:g} s")
                if not (worker.ready or self._begun):
                    self._refuse(late, worker)
                self._replace(position)
                if worker.item is not None:
                    finished.append((worker.item, late))
        return finished

    def _busy(self) -> list[GradingProcess]:
        """Workers with a deadline: those starting and those grading."""
        return [worker for worker in self._workers if not worker.ready or worker.item is not None]

    def _start(self) -> GradingProcess:
        return GradingProcess(self._settings.kind, self._settings.time_limit)

    def _replace(self, position: int) -> None:
        """Kill a worker and start another in its place. After too many failed starts raises `Refusal`, or
        `ScoringStopped` where one has been ready before."""
        worker = self._workers[position]
        worker.kill()
        if not worker.ready:
            self._failed_starts += 1
            if self._failed_starts >= MAX_FAILED_STARTS:
                self._refuse(_Failure(DIED, f"ended {MAX_FAILED_STARTS} processes in a row ({worker.ended()})"), worker)
        self._workers[position] = self._start()

    def _note_start(self, worker: GradingProcess, message: dict[str, Any]) -> None:
        """A message of a worker that starts: it has imported the reward function, or not, or made its first call.

        Raises as `_replace`. What the first call gave is of interest until one worker is ready.
        """
        if "refused" in message:
            self._refuse(_Failure(ERROR, str(message["refused"])), worker)
        if self._trial is not None and not worker.tries:
            worker.tries = True
            limit = max(FIRST_CALL_LIMIT, self._settings.time_limit)
            worker.assign(None, _request(self._trial), limit)  # that it is gone would be seen by the next message
            return
        found = self._graded(message) if worker.tries else None
        if isinstance(found, _Failure) and not self._begun:
            self._refuse(found, worker)
        worker.ready = self._begun = True
        self._failed_starts = 0

    def _refuse(self, failure: _Failure, worker: GradingProcess) -> NoReturn:
        """End everything because of a worker that could not start."""
        self.close()
        kind = f"{self._section}.kind={self._settings.kind}"
        if self._begun:
            raise ScoringStopped(
                f"{kind}: grading processes cannot be started any more ({failure.seen}). Fix: see what has changed "
                "beside the run, then resume it."
            )
        if not worker.tries:
            fix = "correct the path, give the file's path (folder/file.py:function), or put its folder on PYTHONPATH"
            raise Refusal(kind, f"must lead to a function that can be imported ({failure.seen})", fix)
        fix = "correct the function, which is called as function(text, answer, source)"
        if failure.counter == OUT_OF_RANGE:
            fix = f"set {self._section}.low and {self._section}.high to its range"
        elif self._trial is not None and self._trial.extra:
            fix += ", with those columns of data.extra_columns by name that it has arguments for"
        else:
            fix += ", further columns by name where data.extra_columns lists them"
        rule = f"must return a number in {self._range()}, and on being called with the first row of the data it"
        raise Refusal(kind, f"{rule} {failure.seen}", fix)

    def _await_first_worker(self) -> None:
        while not any(worker.ready for worker in self._workers):
            self._collect()

    def _range(self) -> str:
        section, settings = self._section, self._settings
        return f"{section}.low={settings.low:g} to {section}.high={settings.high:g}"

    def _graded(self, message: dict[str, Any]) -> GradedAnswer | _Failure:
        """What a worker's reply says."""
        reward, low, high = message.get("reward"), self._settings.low, self._settings.high
        if not isinstance(reward, float):
            return _Failure(ERROR, str(message.get("error", "gave no result")))
        if self._settings.kind in RULE_KINDS:
            return GradedAnswer(high if reward else low, found=message["found"], why=message["why"])
        if not low <= reward <= high:  # NaN included
            return _Failure(OUT_OF_RANGE, f"returned {reward:g}, outside {self._range()}")
        return GradedAnswer(reward)


def _request(item: GradingItem) -> bytes:
    # What JSON has no form for, such as a date, arrives as its text.
    fields = [item.text, list(item.references), item.source, dict(item.extra)]
    return json.dumps(fields, default=str).encode() + b"\n"
