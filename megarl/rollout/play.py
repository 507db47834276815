"""Samples of several turns: the policy writes, its environment answers, and the policy goes on after what it reads.

There is no barrier between turns: what an environment has answered goes back to the engine while others generate, and
the engine works on what it has while environments think. Each turn's prompt is all that was there before, which the
engine finds in its prefix cache; no token is generated twice.

Environments live on a replica's first rank; what is heard of them is told to its other ranks between two engine steps,
so that all submit the same.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from megarl.environments.base import PROMPT_TOO_LONG, Heard, Verdict
from megarl.errors import ScoringStopped
from megarl.parallel import progress
from megarl.records import FinishReason, Prompt, Stretch
from megarl.rollout.draw import WorkSource
from megarl.rollout.engine import Completion, Engine, Request, Sampling
from megarl.rollout.seeds import hash_seed

#: Seconds that an engine with nothing to do waits for a reply, before its ranks may be asked to stop.
_PATIENCE = 0.05
#: Counters of samples that a bound ended while their environment had more to say.
TURNS_USED_UP, NO_ROOM = "environment_turns_used_up", "environment_no_room"


class Hosting(Protocol):
    """A replica's environments, as `megarl.environments.host.Host` has them."""

    def start(self, index: int, prompt: Prompt, seed: int) -> None: ...

    def turn(self, index: int, token_ids: tuple[int, ...], reason: FinishReason) -> None: ...

    def end(self, index: int) -> None: ...

    def poll(self, timeout: float = 0.0) -> list[Heard]: ...


@dataclass(frozen=True, slots=True)
class Bounds:
    """Bounds of a sample: its turns; tokens of one turn (None: no bound of its own), of all turns and observations
    together, and of a prompt. `samples`: how many are under way at a time. `in_order`: replies are waited for, so that
    what is generated does not depend on how long they take."""

    turns: int
    tokens: int
    prompt_tokens: int
    turn_tokens: int | None = None
    samples: int = 256
    in_order: bool = False


@dataclass(frozen=True, slots=True)
class Task:
    """A sample to generate; `index` comes back with it. Its environment draws by `environment_seed`; `seed` is that of
    its requests to the engine, None where they have none of their own."""

    index: int
    prompt: Prompt
    environment_seed: int
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Played:
    """A sample of several turns. `token_ids` (T,) are what followed the prompt, `log_probs` (T,) the engine's in nats,
    NaN at the environment's tokens; `stretches` say whose they are.

    `finish_reason` is length where a bound ended it. `reward`: what the environment gave with its last reply;
    `verdict`: what it was told for that, counted in `counters`; None where there was none. `failure`: the counter of
    what went wrong with its environment, else None; such a sample may have no token at all. `routed_experts`: those of
    the last turn's prompt and response, as in `Completion`.
    """

    index: int
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    stretches: tuple[Stretch, ...]
    finish_reason: FinishReason
    reward: float | None
    verdict: Verdict | None
    failure: str | None
    counters: dict[str, int]
    routed_experts: np.ndarray | None = field(default=None, compare=False, repr=False)

    @property
    def turns(self) -> tuple[tuple[int, ...], ...]:
        """The tokens of the policy's turns."""
        return tuple(self.token_ids[one.start : one.end] for one in self.stretches if one.source == "policy")


def play(
    engine: Engine,
    tasks: Sequence[Task],
    sampling: Sampling,
    bounds: Bounds,
    host: Hosting | None,
    work: WorkSource,
) -> list[Played]:
    """Generate this replica's part of `tasks`, in index order; the same on all its ranks.

    `host` is there on the replica's first rank. As with `Engine.generate`, `work` says which positions of `tasks` are
    this replica's. Raises `ScoringStopped` on all ranks of the replica where its host does, and `PhaseError` as the
    engine does.
    """
    return _Play(engine, tasks, sampling, bounds, host).run(work)


@dataclass(slots=True)
class _Sample:
    """A sample under way."""

    task: Task
    prompt: tuple[int, ...] | None = None
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    stretches: list[Stretch] = field(default_factory=list)
    reward: float | None = None
    verdict: Verdict | None = None
    counters: Counter[str] = field(default_factory=Counter)
    turns: int = 0
    reason: FinishReason = "stop"
    routed_experts: np.ndarray | None = None

    def add(self, tokens: Sequence[int], log_probs: Sequence[float], stretch: Stretch) -> None:
        self.tokens += tokens
        self.log_probs += log_probs
        self.stretches.append(stretch)


class _Play:
    def __init__(
        self, engine: Engine, tasks: Sequence[Task], sampling: Sampling, bounds: Bounds, host: Hosting | None
    ) -> None:
        self._engine, self._tasks, self._sampling, self._bounds, self._host = engine, tasks, sampling, bounds, host
        self._under_way: dict[int, _Sample] = {}
        self._waiting: set[int] = set()
        """Samples whose environments are to reply; the same on all ranks."""
        self._finished: list[Played] = []

    def run(self, work: WorkSource) -> list[Played]:
        drawn: deque[int] = deque()
        chunk: Sequence[int] | None = ()
        engine, most = self._engine, self._bounds.samples
        with engine.generating(self._sampling):
            while not engine.interrupted and (self._under_way or drawn or chunk is not None):
                if chunk is not None and not drawn and len(self._under_way) < most:
                    chunk = work.draw()
                    drawn.extend(chunk or ())
                while drawn and len(self._under_way) < most:
                    self._begin(self._tasks[drawn.popleft()])
                for completion in engine.pump():
                    self._written(completion)
                if self._waiting:
                    for heard in self._hear():
                        self._heard(heard)
                        progress.tick()
        if self._host is not None:
            for index in self._under_way:
                self._host.end(index)
        return sorted(self._finished, key=lambda played: played.index)

    def _begin(self, task: Task) -> None:
        self._under_way[task.index] = _Sample(task)
        self._waiting.add(task.index)
        if self._host is not None:
            self._host.start(task.index, task.prompt, task.environment_seed)

    def _written(self, completion: Completion) -> None:
        """The policy has written a turn."""
        sample = self._under_way[completion.index]
        start = len(sample.tokens)
        stretch = Stretch(start, start + len(completion.token_ids), "policy", completion.version)
        sample.add(completion.token_ids, completion.log_probs, stretch)
        sample.turns += 1
        sample.reason, sample.routed_experts = completion.finish_reason, completion.routed_experts
        # Asked even where no token is left: the reward of the last turn is the environment's to say.
        self._waiting.add(completion.index)
        if self._host is not None:
            self._host.turn(completion.index, completion.token_ids, completion.finish_reason)

    def _hear(self) -> list[Heard]:
        """What the first rank has heard, on all ranks, in the order of the samples."""
        found, error = self._engine.told(self._listen() if self._host is not None else ([], None))
        if error is not None:
            raise ScoringStopped(error)
        return found

    def _listen(self) -> tuple[list[Heard], str | None]:
        assert self._host is not None
        found: list[Heard] = []
        waits = self._bounds.in_order or not self._engine.running
        try:
            found += self._host.poll(_PATIENCE if waits else 0.0)
            while self._bounds.in_order and len(found) < len(self._waiting):
                found += self._host.poll(_PATIENCE)
        except ScoringStopped as stopped:
            return [], str(stopped)
        return sorted(found, key=lambda heard: heard.index), None

    def _heard(self, heard: Heard) -> None:
        """A sample's environment has replied."""
        self._waiting.discard(heard.index)
        sample, bounds = self._under_way[heard.index], self._bounds
        sample.counters.update(heard.counters)
        if heard.failure is not None:
            self._finish(sample, heard.failure)
        elif sample.prompt is None:
            sample.prompt = heard.token_ids or sample.task.prompt.token_ids
            if len(sample.prompt) > bounds.prompt_tokens:
                self._finish(sample, PROMPT_TOO_LONG)
            else:
                self._submit(sample)
        else:
            sample.reward, sample.verdict = heard.reward, heard.verdict
            if heard.token_ids is None:
                self._finish(sample)
            elif sample.turns == bounds.turns:
                self._finish(sample, bound=TURNS_USED_UP)
            elif len(sample.tokens) + len(heard.token_ids) >= bounds.tokens:
                self._finish(sample, bound=NO_ROOM)
            else:
                self._read(sample, heard.token_ids)
                self._submit(sample)

    def _read(self, sample: _Sample, token_ids: tuple[int, ...]) -> None:
        """The policy is told something."""
        if token_ids:
            start = len(sample.tokens)
            stretch = Stretch(start, start + len(token_ids), "environment", self._engine.version)
            sample.add(token_ids, [float("nan")] * len(token_ids), stretch)

    def _submit(self, sample: _Sample) -> None:
        assert sample.prompt is not None
        task, left = sample.task, self._bounds.tokens - len(sample.tokens)
        seed = task.seed if task.seed is None or not sample.turns else hash_seed("turn", task.seed, sample.turns)
        most = left if self._bounds.turn_tokens is None else min(left, self._bounds.turn_tokens)
        self._engine.submit(Request((*sample.prompt, *sample.tokens), task.index, seed, most))

    def _finish(self, sample: _Sample, failure: str | None = None, bound: str | None = None) -> None:
        index = sample.task.index
        del self._under_way[index]
        if self._host is not None:
            self._host.end(index)
        sample.counters.update(filter(None, (failure, bound)))
        self._finished.append(
            Played(
                index,
                sample.prompt or sample.task.prompt.token_ids,
                tuple(sample.tokens),
                tuple(sample.log_probs),
                tuple(sample.stretches),
                "length" if bound is not None else sample.reason,
                sample.reward if failure is None else None,
                sample.verdict if failure is None else None,
                failure,
                dict(sample.counters),
                sample.routed_experts,
            )
        )
