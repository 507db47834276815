"""Log-probs that the step's sequences lack and an objective needs: of the weights that generated, and of other sets."""

from __future__ import annotations

from megarl.algorithms.objective import sets_read
from megarl.algorithms.plan import Plan
from megarl.config.parameter_sets import POLICY
from megarl.records import Sequence
from megarl.train.session import Session


def add_log_probs(session: Session, batches: list[list[Sequence]]) -> None:
    """Old log-probs, and those under other parameter sets, where an objective needs them. Collective.

    With one update per step the old log-probs are those of the update's own forward pass, so that no pass of
    their own is spent on them.
    """
    objectives = session.algorithm.objectives
    sequences = [sequence for batch in batches for sequence in batch]
    old = [one for one in objectives if one.old]
    if old and len(batches) > 1:
        own = [s for s in sequences if any(one.trains(s.kind) for one in old)]
        with session.clock.phase("old_log_probs"):
            for sequence, values in zip(own, session.policy.measure(own) or [], strict=False):
                sequence.old_log_probs = values
    for name in sets_read(objectives) if batches else ():
        own = [s for s in sequences if any(name in one.under and one.trains(s.kind) for one in objectives)]
        with session.clock.phase(f"{name}_log_probs"):
            for sequence, values in zip(own, session.policy.measure(own, name) or [], strict=False):
                sequence.log_probs_under[name] = values


def first_pass_is_old(session: Session, plan: Plan, batches: list[list[Sequence]]) -> bool:
    """Whether the step's first update has the weights that generated, and their log-probs are not measured before."""
    measured = len(batches) > 1 and any(one.old for one in session.algorithm.objectives)
    return any(one.weights == POLICY for one in plan.generations) and not measured
