"""What of the kept groups is trained: the algorithm's advantages, signals and spans, and the targets."""

from __future__ import annotations

import dataclasses

from megarl.algorithms.base import Algorithm
from megarl.algorithms.objective import BatchTotals
from megarl.records import Sequence
from megarl.train.groups import Rollouts
from megarl.train.route import Item, assign, deliver
from megarl.train.session import Session


def trainable(session: Session, rollouts: Rollouts) -> tuple[list[list[Sequence]], list[BatchTotals]]:
    """This rank's sequences of each mini-batch, and the whole mini-batch's counts. Collective."""
    config, pairs = session.config, session.algorithm.needs.pairs
    with session.clock.phase("advantages"):
        items = step_items(session.algorithm, rollouts)
        batches = assign(rollouts, items, config.batch.updates, session.grid.data, together=pairs)
        sequences = deliver(rollouts, batches, config, session.world, _routing(session))
    return sequences, [batch.totals for batch in batches]


def step_items(algorithm: Algorithm, rollouts: Rollouts) -> dict[int, list[Item]]:
    """`items_of` of each kept group, with the advantages of the whole step."""
    items = {group: items_of(algorithm, rollouts, group) for group in rollouts.kept}
    samples = [item for of_group in items.values() for item in of_group if not item.target]
    advantages = algorithm.batch_advantages(
        tuple(item.advantage for item in samples), tuple(item.trained for item in samples)
    )
    known = {id(item): advantage for item, advantage in zip(samples, advantages, strict=True)}
    return {
        group: [dataclasses.replace(item, advantage=known.get(id(item), item.advantage)) for item in of_group]
        for group, of_group in items.items()
    }


def items_of(algorithm: Algorithm, rollouts: Rollouts, group: int) -> list[Item]:
    """The group's samples with a trained span, then its targets; advantages are those of the group alone."""
    outcome = rollouts.outcome(group)
    shaped = dataclasses.replace(outcome, rewards=algorithm.shape_rewards(outcome))
    advantages, signals, spans = algorithm.advantages(shaped), algorithm.signals(shaped), algorithm.spans(shaped)
    samples = [
        Item(
            group=group,
            number=k,
            holder=score.holder,
            start=spans[k][0],
            end=spans[k][1],
            advantage=advantages[k],
            signals={name: values[k] for name, values in signals.items()},
        )
        for k, score in enumerate(rollouts.scores_of(group))
        if spans[k][0] < spans[k][1]
    ]
    rollouts.count("samples_not_trained", len(spans) - len(samples))
    targets = [
        Item(group=group, number=target.number, holder=target.holder, start=0, end=target.length, target=True)
        for target in rollouts.targets.get(group, ())
    ]
    if algorithm.needs.pairs and not (samples and targets):
        rollouts.count("groups_without_pair")
        return []
    return samples + targets


def _routing(session: Session) -> tuple[int, int] | None:
    """Sparse layers and experts per token of the recorded routing, None where it is not recorded."""
    if session.config.moe.routing_replay == "off":
        return None
    return sum(session.shape.sparse_layers), session.shape.experts_per_token
