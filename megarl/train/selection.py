"""What of the kept groups is trained: the algorithm's credit, on the ranks that train on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from collections.abc import Sequence as Sequences
from typing import NamedTuple

from megarl.algorithms.base import Credit, Group, Span, Trained, whole
from megarl.algorithms.objective import BatchTotals
from megarl.records import Key, Sequence
from megarl.train.groups import Rollouts, added
from megarl.train.route import CreditedGroup, assign, deliver
from megarl.train.session import Session


class Trainable(NamedTuple):
    """This rank's sequences of each mini-batch, the whole mini-batch's counts, what was counted on the way, how many
    groups were not left out, and the spans that are trained of each trajectory, which all ranks know."""

    batches: list[list[Sequence]]
    totals: list[BatchTotals]
    counters: dict[str, int]
    groups: int
    spans: Mapping[Key, tuple[Span, ...]]


def trainable(session: Session, rollouts: Rollouts, step: int) -> Trainable:
    """What the step trains on, by the algorithm's credit. Collective."""
    config, algorithm = session.config, session.algorithm
    together = any(objective.together for objective in algorithm.objectives)
    with session.clock.phase("advantages"):
        credits = algorithm.credit(step, rollouts.kept.groups)
        credited, counters = credited_groups(rollouts.kept.groups, credits)
        demonstrations = [
            CreditedGroup(group, tuple(Trained(head, whole(head)) for head in group.heads))
            for group in rollouts.demonstrations
        ]
        batches, more = assign(
            credited, config.batch.updates, session.grid.data, together=together, beside=demonstrations
        )
        items, version = [batch.items for batch in batches], session.progress.step
        sequences = deliver(rollouts.bodies, items, config, session.world, routing_of(session), version)
    groups = sum(credit.left_out is None for credit in credits)
    spans = {one.head.key: one.spans for group in credited for one in group.trained}
    return Trainable(sequences, [batch.totals for batch in batches], added(counters, more), groups, spans)


def credited_groups(groups: Sequences[Group], credits: Sequences[Credit]) -> tuple[list[CreditedGroup], dict[str, int]]:
    """The groups with what of them is trained, nothing of those that are left out; and what is counted."""
    found: list[CreditedGroup] = []
    counters: Counter[str] = Counter()
    for group, credit in zip(groups, credits, strict=True):
        trained = tuple(one for one in credit.trained if one.spans)
        answers = sum(one.head.key.kind == "answer" for one in trained)
        counters["samples_not_trained"] += len(group.answers) - answers
        counters.update(credit.counters)
        if credit.left_out is not None:
            counters[credit.left_out] += 1
            trained = ()
        found.append(CreditedGroup(group, trained))
    return found, added(counters)


def routing_of(session: Session) -> tuple[int, int] | None:
    """Sparse layers and experts per token of the recorded routing, None where it is not recorded."""
    if session.config.moe.routing_replay == "off":
        return None
    return sum(session.policy.shape.sparse_layers), session.policy.shape.experts_per_token
