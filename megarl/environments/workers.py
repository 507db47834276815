"""A replica's environments as the training process sees them: asked without waiting, heard when they have replied."""

from __future__ import annotations

import dataclasses
import json
import select
import time
from dataclasses import dataclass
from typing import Any

from megarl.config.environments import EnvironmentSettings
from megarl.environments.base import DIED, Traits
from megarl.errors import MegarlError, Refusal, ScoringStopped
from megarl.parallel.helper import START_LIMIT, Helper
from megarl.records import Prompt

#: Number of the sample that is made up to try an environment.
_TRIAL = -1


@dataclass(frozen=True, slots=True)
class Answered:
    """What the environment of a sample gave to what it was asked: `given` as `megarl.environments.base` checks it, or
    `failure`, the counter of what went wrong; `seen` continues a sentence about that."""

    sample: int
    given: Any = None
    failure: str | None = None
    seen: str = ""


class Environments:
    """Environments of samples, each in a process of its own, under a keeper (`megarl.environments.keeper`).

    `start`, `turn` and `end` return at once; `poll` gives what came of them. A sample is asked one thing at a time. It
    fails alone, whatever its environment does. Use `close()` at the end.

    Raises `Refusal` where the class cannot be imported, lacks a method, or fails on `trial`, a row of the data.
    """

    def __init__(self, settings: EnvironmentSettings, trial: Prompt | None = None) -> None:
        self._settings = settings
        self._asked: set[int] = set()
        """Samples whose replies are awaited."""
        self._lost: list[Answered] = []
        self._first_failure: str | None = None
        self._keeper, self.traits = self._begin()
        if trial is not None:
            self._try(trial)

    def start(self, sample: int, prompt: Prompt, seed: int = 0) -> None:
        """Begin with a sample, whose environment draws by `seed`."""
        self._ask(sample, ["start", sample, seed, dataclasses.asdict(prompt)])

    def turn(self, sample: int, said: str | tuple[int, ...], verdict: float | None = None) -> None:
        """Tell a sample's environment what the policy wrote."""
        self._ask(sample, ["turn", sample, said, verdict])

    def end(self, sample: int) -> None:
        """A sample has come to its end; what it was asked is not awaited any more."""
        self._asked.discard(sample)
        self._lost = [one for one in self._lost if one.sample != sample]
        self._send(["end", sample])

    def note_failure(self, seen: str) -> None:
        """An environment failed on a sample; `seen` continues a sentence about it."""
        if self._first_failure is None:
            kind = self._settings.kind
            self._first_failure = f"rollout.environment.kind={kind} failed on a sample for the first time: it {seen}"

    def poll(self, timeout: float = 0.0, bell: int | None = None) -> list[Answered]:
        """Replies that have arrived; where there are none, those that arrive within `timeout` seconds, and before the
        file descriptor `bell`, if any, can be read from.

        Raises `ScoringStopped` where the keeper has ended and cannot be started any more.
        """
        found, self._lost = self._lost, []
        ready, until = select.poll(), time.monotonic() + timeout
        if self._asked:
            ready.register(self._keeper.stdout, select.POLLIN)
        if bell is not None:
            ready.register(bell, select.POLLIN)
        while self._asked or bell is not None:
            events = ready.poll(0 if found else max(0.0, until - time.monotonic()) * 1000)
            if all(descriptor == bell for descriptor, _ in events):
                break
            try:
                messages = self._keeper.receive()
            except (EOFError, json.JSONDecodeError):
                self._replace()
                return found + self.poll()
            for message in messages:
                number: Any = message["sample"]
                if number in self._asked:
                    self._asked.discard(number)
                    found.append(self._answered(number, message))
        return found

    def take_first_failure(self) -> str | None:
        """A sentence about the first failure since it was last asked for, if there was one."""
        found, self._first_failure = self._first_failure, None
        return found

    def close(self) -> None:
        """End all processes. May be called more than once."""
        if self._keeper.process.returncode is None:
            # The keeper ends those that it has forked.
            self._keeper.stdin.close()
            try:
                self._keeper.process.wait(10)
            except Exception:
                self._keeper.process.kill()
        self._keeper.kill()

    def _answered(self, sample: int, message: dict[str, Any]) -> Answered:
        if "failed" not in message:
            return Answered(sample, message["given"])
        self.note_failure(message["seen"])
        return Answered(sample, None, message["failed"], message["seen"])

    def _ask(self, sample: int, request: list[Any]) -> None:
        if sample in self._asked:
            raise MegarlError(f"the environment of sample {sample} is asked while it has not yet replied")
        self._asked.add(sample)
        self._send(request)

    def _send(self, request: list[Any]) -> None:
        # What JSON has no form for, such as a date, arrives as its text. That the keeper is gone is seen by `poll`.
        self._keeper.send(json.dumps(request, default=str).encode() + b"\n")

    def _replace(self) -> None:
        """The keeper is gone, and with it every environment: somebody has ended it."""
        self._keeper.kill()
        failed = [Answered(sample, None, DIED, f"ended its keeper ({self._keeper.ended()})") for sample in self._asked]
        self._asked.clear()
        self._lost += failed
        self.note_failure(f"ended its keeper ({self._keeper.ended()})")
        try:
            self._keeper, self.traits = self._begin()
        except Refusal as refusal:
            raise ScoringStopped(f"Environments cannot be started any more: {refusal} Then resume the run.") from None

    def _begin(self) -> tuple[Helper, Traits]:
        settings = self._settings
        arguments = (settings.kind, json.dumps(settings.arguments), str(settings.time_limit), str(settings.workers))
        keeper = Helper("megarl.environments.keeper", *arguments)
        ready = select.poll()
        ready.register(keeper.stdout, select.POLLIN)
        seen, until = f"was not imported within {START_LIMIT:g} s", time.monotonic() + START_LIMIT
        while ready.poll(max(0.0, until - time.monotonic()) * 1000):
            try:
                messages = keeper.receive()
            except (EOFError, json.JSONDecodeError):
                keeper.kill()
                seen = f"ended its process ({keeper.ended()})"
                break
            for message in messages:
                if "refused" in message:
                    keeper.kill()
                    self._refuse(f"must lead to a class with the methods start and turn ({message['refused']})")
                traits: Any = message["ready"]
                return keeper, Traits(traits["tokens"], traits["verdict"], tuple(traits["stops"]))
        keeper.kill()
        self._refuse(f"must lead to a class that can be imported ({seen})")
        raise AssertionError

    def _try(self, prompt: Prompt) -> None:
        self.start(_TRIAL, prompt)
        answered = self.poll(self._settings.time_limit * 2 + START_LIMIT)
        if not answered or answered[0].failure is not None:
            self.close()
            seen = answered[0].seen if answered else "gave no reply"
            arguments = ", ".join(f"{name}={value!r}" for name, value in self._settings.arguments.items())
            self._refuse(f"must start with the first row of the data, and called with ({arguments}) it {seen}")
        self.end(_TRIAL)

    def _refuse(self, rule: str) -> None:
        kind = self._settings.kind
        fix = "correct the class, or its arguments (rollout.environment.arguments)"
        if rule.startswith("must lead"):
            fix = "correct the path, give the file's path (folder/file.py:Class), or put its folder on PYTHONPATH"
        raise Refusal(f"rollout.environment.kind={kind}", rule, fix)
