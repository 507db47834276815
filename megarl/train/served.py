"""Log-probs under weights that somebody else serves: of each replica one rank asks, and tells the others."""

from __future__ import annotations

from collections.abc import Sequence as Sequences
from typing import NamedTuple

import numpy as np

from megarl.config.grid import grid_of_rank
from megarl.errors import ScoringStopped, TrainingStopped
from megarl.parallel.exchange import gather_all, send_arrays
from megarl.records import Sequence
from megarl.servers.asking import AskingGivenUp
from megarl.train.groups import added
from megarl.train.session import Session


class Served(NamedTuple):
    """Log-probs of each sequence's trained tokens, float32 (T,), None where there are none to be had; what was counted
    on the way, the same on all ranks."""

    values: list[np.ndarray | None]
    counters: dict[str, int]


class _Told(NamedTuple):
    """What a rank that asked tells the others."""

    answered: int
    of: int
    counters: dict[str, int]
    first_failure: str | None
    failure: str | None


def measure(session: Session, sequences: Sequences[Sequence], name: str) -> Served:
    """Log-probs under the served set `name`. `sequences` are those of this data-parallel replica. Collective.

    Raises on all ranks `TrainingStopped` where the server stays away, takes no request any more, or fails on too many
    sequences; `StopAsked` where the run was asked to stop and the step would not end in time.
    """
    found: list[np.ndarray | None] = []
    failure, late, counters, first_failure = None, False, {}, None
    if session.grid.reports:
        server = session.served[name]
        assert server is not None
        try:
            found = server.log_probs([one.tokens.tolist() for one in sequences], lambda: session.stops.too_late)
        except ScoringStopped as stopped:
            failure = str(stopped)
        except AskingGivenUp:
            late = True
        counters, first_failure = server.take_counters(), server.take_first_failure()
    answered = sum(one is not None for one in found)
    told = gather_all(_Told(answered, len(found), counters, first_failure, failure))
    for one in told:
        if one.failure is not None:
            raise TrainingStopped(one.failure)
    session.stops.give_up_if(late)
    said = next((one.first_failure for one in told if one.first_failure is not None), None)
    if said is not None:
        session.recorder.status(f"{said}; such answers are left out, and counted in metrics.jsonl")
    of = sum(one.of for one in told)
    if of and not any(one.answered for one in told):
        raise TrainingStopped(
            f"The {name} gave log-probs of none of {of} answers ({said or 'as before'}), so there is nothing to learn. "
            f"Fix: see the {name}'s own log, then resume the run."
        )
    values = [
        None if one is None else one[sequence.positions - 1] for one, sequence in zip(found, sequences, strict=False)
    ]
    return Served(_shared(session, sequences, values), added(*(one.counters for one in told)))


def _shared(
    session: Session, sequences: Sequences[Sequence], values: list[np.ndarray | None]
) -> list[np.ndarray | None]:
    """On all ranks of a replica the values that the one that reports has. Collective."""
    world, own = session.world, session.grid
    grids = [grid_of_rank(rank, world.size, session.config.parallel) for rank in range(world.size)]
    sizes = [one.trained for one in sequences]
    # NaN stands for what there is not: what the server gives is finite.
    parts = [
        np.full(size, np.nan, np.float32) if one is None else one for one, size in zip(values, sizes, strict=False)
    ]
    nothing = np.empty(0, np.int32)
    flat = np.concatenate([*(part.view(np.int32) for part in parts), nothing])
    outgoing = [flat if own.reports and grid.data_rank == own.data_rank else nothing for grid in grids]
    incoming = [sum(sizes) if grid.reports and grid.data_rank == own.data_rank else 0 for grid in grids]
    whole = np.concatenate(send_arrays(outgoing, incoming)).view(np.float32)
    found = np.split(whole, np.cumsum(sizes)[:-1]) if sizes else []
    return [None if np.isnan(one).any() else one for one in found]
