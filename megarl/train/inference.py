"""Whose memory and whose weights: the engine wakes filled, changes its weights, and sleeps."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from megarl.config.parameter_sets import POLICY
from megarl.errors import TrainingStopped
from megarl.parallel.cpu_platform import has_cuda
from megarl.policy.determinism import repeats
from megarl.policy.policy import Policy
from megarl.rollout.draw import WorkSource
from megarl.rollout.engine import Engine
from megarl.train.carry import Progress
from megarl.train.clock import Clock
from megarl.train.memory import MemoryWatch
from megarl.train.stops import StopAsked
from megarl.weights.push import Difference, Push


class Traffic(NamedTuple):
    """Weight pushes of this rank: how many, bytes that went to other ranks and that came from them, and seconds."""

    pushes: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    seconds: float = 0.0


class Inference:
    """The engine of this rank, awake or asleep, and the weights in it; without an engine nothing is done.

    Weights that are pushed have the version of `progress`: how many steps they have learned from. Seconds are counted
    as those of the phase "push".
    """

    def __init__(
        self, policy: Policy, engine: Engine | None, clock: Clock, memory: MemoryWatch, progress: Progress
    ) -> None:
        self.engine = engine
        assignment = policy.config.rollout.assignment
        self._fixed_assignment = repeats(policy.config) if assignment is None else assignment == "fixed"
        self._policy, self._clock, self._memory, self._progress = policy, clock, memory, progress
        self._push = Push(policy, engine) if engine is not None else None
        #: The parameter set that the engine was last filled with.
        self._weights = POLICY
        self._traffic = Traffic()

    @contextmanager
    def awake(self, weights: str = POLICY) -> Iterator[None]:
        """The engine is awake inside, filled with the parameter set `weights`.

        It also sleeps again where all ranks leave together, by `TrainingStopped` or `StopAsked`; any other error ends
        the run as it is.
        """
        self.wake(weights)
        try:
            yield
        except (TrainingStopped, StopAsked):
            self.sleep()
            raise
        self.sleep()

    def wake(self, weights: str = POLICY) -> None:
        """Memory goes to the engine, and with it the parameter set `weights`."""
        if self.engine is None:
            return
        with self._clock.phase("push"):
            self._policy.offload_optimizers()
            self._fill(self.engine, weights)

    def sleep(self) -> None:
        """Memory goes back to the policy."""
        if self.engine is None:
            return
        with self._clock.phase("push"):
            self._let_sleep(self.engine)
            self._policy.onload()

    def use(self, weights: str) -> None:
        """Let the engine, which is awake, generate with the parameter set `weights`."""
        if self.engine is None or self._weights == weights:
            return
        with self._clock.phase("push"):
            self._let_sleep(self.engine)
            if weights in self._policy.trained:
                self._policy.onload_weights()
            self._fill(self.engine, weights)

    @property
    def running_engine(self) -> Engine:
        """The engine of a run that generates."""
        assert self.engine is not None
        return self.engine

    def work(self, total: int) -> WorkSource:
        """Which of `total` requests are this replica's: fixed or drawn, by `rollout.assignment`."""
        engine = self.running_engine
        return engine.fixed_assignment(total) if self._fixed_assignment else engine.shared_counter(total)

    def differences(self) -> list[Difference]:
        """Where the weights in the engine are not those that it was filled with. Collective."""
        assert self._push is not None
        with self._policy.using(self._weights):
            return self._push.differences()

    def take_traffic(self) -> Traffic:
        """What was pushed since the last call."""
        traffic, self._traffic = self._traffic, Traffic()
        return traffic

    def _let_sleep(self, engine: Engine) -> None:
        """Put the engine to sleep, which must still hold what it was filled with: raises `EngineChanged` on all
        ranks."""
        assert self._push is not None
        with self._policy.using(POLICY if has_cuda() else self._weights):
            self._push.check()
        self._memory.note("generate")
        engine.sleep()
        self._memory.note("asleep")

    def _fill(self, engine: Engine, weights: str) -> None:
        """Wake the engine, which sleeps, with these weights in it."""
        assert self._push is not None
        engine.wake_weights()
        with self._policy.using(weights):
            start = time.perf_counter()
            self._push.run(version=self._progress.step)
            before, mover = self._traffic, self._push.mover
            self._traffic = Traffic(
                before.pushes + 1,
                before.sent_bytes + mover.sent_bytes,
                before.received_bytes + mover.received_bytes,
                before.seconds + time.perf_counter() - start,
            )
            self._memory.note("push")
        self._policy.offload_weights()
        engine.wake_cache()
        self._weights = weights
