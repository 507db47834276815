"""Whose memory and whose weights: the engine wakes filled, changes its weights, and sleeps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megarl.config.parameter_sets import POLICY
from megarl.errors import TrainingStopped
from megarl.parallel.cpu_platform import has_cuda
from megarl.train.session import Session
from megarl.train.stops import StopAsked


@contextmanager
def awake(session: Session, weights: str = POLICY) -> Iterator[None]:
    """The engine is awake inside, filled as by `wake_engine`.

    It also sleeps again where all ranks leave together, by `TrainingStopped` or `StopAsked`; any other error ends the
    run as it is.
    """
    wake_engine(session, weights)
    try:
        yield
    except (TrainingStopped, StopAsked):
        sleep_engine(session)
        raise
    sleep_engine(session)


def wake_engine(session: Session, weights: str = POLICY) -> None:
    """Memory goes to the engine, and with it the parameter set `weights`."""
    if session.engine is None:
        return
    with session.clock.phase("push"):
        session.policy.offload_optimizers()
        _fill(session, weights)


def sleep_engine(session: Session) -> None:
    """Memory goes back to the policy."""
    if session.engine is None:
        return
    with session.clock.phase("push"):
        _let_sleep(session)
        session.policy.onload()


def serve(session: Session, weights: str) -> None:
    """Let the engine, which is awake, generate with the parameter set `weights`."""
    if session.engine is None or session.serving == weights:
        return
    with session.clock.phase("push"):
        _let_sleep(session)
        if weights == POLICY:
            session.policy.onload_weights()
        _fill(session, weights)


def _let_sleep(session: Session) -> None:
    """Put the engine to sleep, which must still hold what it was filled with: raises `EngineChanged` on all ranks."""
    assert session.engine is not None and session.push is not None
    with session.policy.using(POLICY if has_cuda() else session.serving):
        session.push.check()
    session.engine.sleep()


def _fill(session: Session, weights: str) -> None:
    """Wake the engine, which sleeps, with these weights in it."""
    assert session.engine is not None and session.push is not None
    session.engine.wake_weights()
    with session.policy.using(weights):
        session.push.run(version=session.progress.step)
    session.policy.offload_weights()
    session.engine.wake_cache()
    session.serving = weights
