"""Rewards of responses, computed in worker processes that may hang or die without hurting the run."""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import megarl
from megarl.config.sections import RewardSettings
from megarl.errors import MegarlError, Refusal
from megarl.parallel import progress
from megarl.rewards.answers import GradedAnswer, GradingItem, scaled
from megarl.rewards.math import boxed, boxed_equals, nothing_to_grade
from megarl.rewards.text import token_f1

#: Seconds a worker may take to import its reward function.
START_LIMIT = 300.0
#: Processes that may end in a row before they are ready, before the grader gives up.
MAX_FAILED_STARTS = 3
#: Multiple of the time limit after which a worker ends itself, should this process be gone.
BACKSTOP_FACTOR = 20.0
#: Counts answers whose grading process ended.
DIED = "grader_died"
#: Kinds decided by comparing text, in this process.
TEXT_KINDS = ("boxed", "f1")


class _Worker:
    """One grading process and the answer it works on."""

    def __init__(self, kind: str, time_limit: float) -> None:
        # Its own interpreter finds megarl and the user's modules where this one does.
        package_root = str(Path(megarl.__file__).resolve().parent.parent)
        python_path = os.pathsep.join([package_root, *(entry or os.getcwd() for entry in sys.path)])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "megarl.rewards.worker", kind, str(time_limit * BACKSTOP_FACTOR)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": python_path, "OMP_NUM_THREADS": "1"},
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        self.ready = False
        self.item: int | None = None
        self.deadline = time.monotonic() + START_LIMIT
        self.limit, self.started_at = START_LIMIT, 0.0
        self.received = b""

    def assign(self, item: int, request: bytes, time_limit: float) -> bool:
        """Send the request of item number `item`; False where the process is gone.

        The process is waiting for a request, so it reads this one at once, however long it is.
        """
        self.item = item
        self.deadline = time.monotonic() + time_limit
        self.limit, self.started_at = time_limit, self._activity()[1]
        try:
            self.stdin.write(request)
            self.stdin.flush()
        except BrokenPipeError:
            return False
        return True

    def overdue(self) -> bool:
        """Whether the time limit has passed.

        For a process that wants to run, the limit is one of processor time: on a crowded machine an answer would
        otherwise score by what else happens to run. A process that sleeps has no such excuse.
        """
        now = time.monotonic()
        if now < self.deadline:
            return False
        state, processor_seconds = self._activity()
        left = self.limit - (processor_seconds - self.started_at)
        if state not in "RD" or left <= 0:
            return True
        self.deadline = now + max(left, 0.01)
        return False

    def _activity(self) -> tuple[str, float]:
        """The process's state letter and the processor seconds it has used; ("?", 0.0) where nothing says so."""
        try:
            # The name, in brackets, may hold anything; state is the first field after it, the times the 12th and 13th.
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return "?", 0.0
        return fields[0], (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def receive(self) -> dict[str, object] | None:
        """The message that arrived, or None where it is not complete yet. Raises EOFError where the process is gone."""
        data = os.read(self.stdout.fileno(), 1 << 16)
        if not data:
            raise EOFError
        self.received += data
        line, newline, rest = self.received.partition(b"\n")
        if not newline:
            return None
        self.received = rest
        return json.loads(line)

    def kill(self) -> None:
        """End the process whatever it does, and release its pipes."""
        self.process.kill()
        self.process.wait()
        self.stdout.close()
        with contextlib.suppress(BrokenPipeError):  # bytes it never read may still be buffered
            self.stdin.close()


class Grader:
    """Grades responses in `settings.workers` processes of its own, started at construction.

    An answer that hangs, kills its process or raises costs that answer its reward and is counted; the process
    is replaced. Answers that need no mathematics are decided at once. Use as a context manager, or `close()`.

    Raises `Refusal` where `reward.kind` is not built in and cannot be imported, or low is not below high.
    """

    def __init__(self, settings: RewardSettings) -> None:
        if not settings.low < settings.high:
            raise Refusal(
                f"reward.low={settings.low}", f"must be below reward.high={settings.high}", "swap or widen them"
            )
        self._settings = settings
        self._failed_starts = 0
        self._workers: list[_Worker] = []
        self._closed = False
        if settings.kind in TEXT_KINDS:
            return  # comparing text needs no process
        self._workers = [self._start() for _ in range(settings.workers)]
        if settings.kind != "math":
            self._await_first_worker()  # a wrong import path is refused here, not after the first generation

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

        Raises `Refusal` as at construction, `MegarlError` where no worker can be started any more.
        """
        if self._closed:
            raise MegarlError("The grader is closed.")
        for position, worker in enumerate(self._workers):
            if worker.item is not None:  # an earlier call was interrupted: its answer must not be taken for one of ours
                self._replace(position)
        graded = {index: answer for index, item in enumerate(items) if (answer := self._decide(item)) is not None}
        waiting = deque(index for index in range(len(items)) if index not in graded)
        again: set[int] = set()
        while len(graded) < len(items):
            for position, worker in enumerate(self._workers):
                if not (waiting and worker.ready and worker.item is None):
                    continue
                index = waiting.popleft()
                if not worker.assign(index, _request(items[index]), self._settings.time_limit):
                    # It died while idle: that is not this answer's fault.
                    waiting.appendleft(index)
                    self._replace(position)
            for index, answer in self._collect():
                if answer.counter == DIED and index not in again:
                    # Perhaps somebody else killed its process: an answer that kills every one does so twice.
                    again.add(index)
                    waiting.appendleft(index)
                    continue
                graded[index] = answer
                progress.tick()
        return [graded[index] for index in range(len(items))]

    def begin_step(self) -> None:
        """Nothing here is bounded per step."""

    def take_counters(self) -> dict[str, int]:
        """Empty: everything is counted with the answer it happened to."""
        return {}

    def _decide(self, item: GradingItem) -> GradedAnswer | None:
        """The reward of what is decided without a worker, else None."""
        if self._settings.kind == "f1":
            share = max(token_f1(item.text, reference) for reference in item.references)
            return GradedAnswer(scaled(share, self._settings.low, self._settings.high))
        if self._settings.kind not in ("math", "boxed"):
            return None
        right = any(boxed_equals(item.text, answer) for answer in item.references)
        if right:
            return GradedAnswer(self._settings.high)
        nothing = boxed(item.text) is None and nothing_to_grade(item.text)
        return GradedAnswer(self._settings.low) if nothing or self._settings.kind == "boxed" else None

    def _collect(self) -> list[tuple[int, GradedAnswer]]:
        """Wait for the next message or deadline; returns (item number, answer) of what ended by it."""
        timeout = max(0.0, min(worker.deadline for worker in self._busy()) - time.monotonic())
        pipes = {worker.stdout.fileno(): position for position, worker in enumerate(self._workers)}
        poll = select.poll()
        for pipe in pipes:
            poll.register(pipe, select.POLLIN)
        finished = []
        for pipe, _ in poll.poll(timeout * 1000 + 1):
            position = pipes[pipe]
            worker, item = self._workers[position], self._workers[position].item
            try:
                message = worker.receive()
            except (EOFError, json.JSONDecodeError):
                self._replace(position)
                if item is not None:
                    finished.append((item, self._failed(DIED)))
                continue
            if message is None:
                continue
            if item is None:
                self._note_start(worker, message)
            else:
                worker.item = None
                finished.append((item, self._graded(message)))
        for position, worker in enumerate(self._workers):
            if worker in self._busy() and worker.overdue():
                item = worker.item
                self._replace(position)
                if item is not None:
                    finished.append((item, self._failed("grader_timeout")))
        return finished

    def _busy(self) -> list[_Worker]:
        """Workers with a deadline: those starting and those grading."""
        return [worker for worker in self._workers if not worker.ready or worker.item is not None]

    def _start(self) -> _Worker:
        return _Worker(self._settings.kind, self._settings.time_limit)

    def _replace(self, position: int) -> None:
        """Kill a worker and start another in its place. Raises `MegarlError` after too many failed starts."""
        worker = self._workers[position]
        worker.kill()
        if not worker.ready:
            self._failed_starts += 1
            if self._failed_starts >= MAX_FAILED_STARTS:
                self.close()
                raise MegarlError(
                    f"reward.kind={self._settings.kind}: {MAX_FAILED_STARTS} grading processes in a row ended before "
                    f"they were ready (last exit status {worker.process.returncode}); see their messages above."
                )
        self._workers[position] = self._start()

    def _note_start(self, worker: _Worker, message: dict[str, object]) -> None:
        """A worker's first message: it is ready, or it cannot import the reward function (raises `Refusal`)."""
        if "refused" in message:
            self.close()
            raise Refusal(
                f"reward.kind={self._settings.kind}",
                f"must be math, boxed, f1, judge or an importable package.module:function ({message['refused']})",
                "correct the path, or put the module's folder on PYTHONPATH",
            )
        worker.ready = True
        self._failed_starts = 0

    def _await_first_worker(self) -> None:
        while not any(worker.ready for worker in self._workers):
            self._collect()

    def _graded(self, message: dict[str, object]) -> GradedAnswer:
        reward = message.get("reward")
        if not isinstance(reward, float):
            return self._failed("grader_error")
        low, high = self._settings.low, self._settings.high
        if self._settings.kind == "math":
            reward = high if reward else low
        if math.isnan(reward) or not low <= reward <= high:
            return self._failed("reward_out_of_range")
        return GradedAnswer(reward)

    def _failed(self, counter: str) -> GradedAnswer:
        return GradedAnswer(self._settings.low, counter)


def _request(item: GradingItem) -> bytes:
    return json.dumps([item.text, list(item.references), item.source]).encode() + b"\n"
