"""Log-probs that the step's sequences lack: of the policy before its update, and under other parameter sets."""

from __future__ import annotations

from collections.abc import Sequence as Sequences

import numpy as np

from megarl.algorithms.objective import Objective, first_pass_is_old, sets_read
from megarl.config.parameter_sets import POLICY
from megarl.records import Sequence
from megarl.train import served
from megarl.train.groups import added
from megarl.train.served import Served
from megarl.train.session import Session


def log_probs_under(session: Session, sequences: Sequences[Sequence], name: str) -> Served:
    """Log-probs of the sequences' trained tokens under the parameter set `name`: asked for where somebody serves it,
    else measured, and then on the last pipeline stage alone. `sequences` are those of this data-parallel replica.
    Collective. Raises on all ranks as `served.measure`."""
    with session.clock.phase("old_log_probs" if name == POLICY else f"{name}_log_probs"):
        if name in session.served:
            return served.measure(session, sequences, name)
        return Served([*(session.policy.measure(sequences, name) or [])], {})


def add_log_probs(session: Session, batches: list[list[Sequence]]) -> dict[str, int]:
    """Old log-probs, but for those that are known from an earlier step, and those under other parameter sets, where an
    objective needs them. Collective.

    With one update per step the old log-probs are those of the update's own forward pass, so that no pass of
    their own is spent on them. Sequences of which a server gives no log-probs are taken out of `batches`; what was
    counted of servers is returned. Raises on all ranks as `served.measure`.
    """
    counters: dict[str, int] = {}
    objectives = session.algorithm.objectives
    sequences = [sequence for batch in batches for sequence in batch]
    if not first_pass_is_old(objectives, len(batches)):
        own = [s for s in sequences if any(one.old and one.trains(s.kind) for one in objectives)]
        for sequence, values in zip(own, log_probs_under(session, own, POLICY).values, strict=False):
            known = sequence.old_log_probs
            assert values is not None
            sequence.old_log_probs = values if known is None else np.where(np.isnan(known), values, known)
    for name in sets_read(objectives) if batches else ():
        own = [s for s in sequences if any(name in one.under and one.trains(s.kind) for one in objectives)]
        found = log_probs_under(session, own, name)
        counters = added(counters, found.counters)
        lacking = []
        for sequence, values in zip(own, found.values, strict=False):
            if values is None:
                lacking.append(sequence)
            else:
                sequence.log_probs_under[name] = values
        _take_out(batches, lacking, objectives)
    return counters


def _take_out(batches: list[list[Sequence]], lacking: list[Sequence], objectives: Sequences[Objective]) -> None:
    """Take sequences out of the mini-batches, with all of their group where an objective wants it together."""
    together = any(one.together for one in objectives)
    groups = {one.group for one in lacking} if together else set()
    taken = {id(one) for one in lacking}
    for batch in batches:
        batch[:] = [one for one in batch if id(one) not in taken and one.group not in groups]
