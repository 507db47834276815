"""What an algorithm wants to know of the kept groups before they grow and get credit, measured where the samples'
tokens are; and old log-probs of what a later step is to learn."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from megarl import records
from megarl.algorithms import declared
from megarl.algorithms.base import Trained, whole
from megarl.algorithms.plan import Influence, Probe
from megarl.config.grid import grid_of_rank
from megarl.config.parameter_sets import POLICY
from megarl.data.packing import balance
from megarl.errors import Refusal
from megarl.parallel.exchange import gather_all, send_arrays
from megarl.records import Body, Head, Key
from megarl.train.groups import Kept, Rollouts
from megarl.train.route import Item, deliver
from megarl.train.selection import routing_of
from megarl.train.session import Session
from megarl.train.values import log_probs_under


class _Pass(NamedTuple):
    """A pass over the samples of one kind under one parameter set: the probes that it serves, the influence among
    these, and whether the log-probs are kept as old ones."""

    parameters: str
    kind: str
    probes: tuple[Probe, ...]
    influence: Influence | None = None
    keeps_old: bool = False


class _Values(NamedTuple):
    """What is measured of this replica's sequences: log-probs, None where a server gives none, and entropies, (T,)
    each, and influences (S,). A list is empty where nothing of it is measured, or on ranks that another reports for."""

    log_probs: Sequence[np.ndarray | None]
    entropies: Sequence[np.ndarray] = ()
    influences: Sequence[np.ndarray] = ()

    def of(self, probe: Probe, number: int) -> np.ndarray | None:
        """What a probe measures of a sequence; None where there is nothing to be had."""
        if isinstance(probe.measures, Influence):
            # Without that of the prompt.
            return self.influences[number][1:]
        return self.log_probs[number] if probe.measures == "log_probs" else self.entropies[number]


class _Found(NamedTuple):
    """What a rank tells the others of a probe: the numbers of its samples, and how many were the most of one that had
    more than the probe says."""

    numbers: dict[Key, tuple[float, ...]]
    beyond: int = 0


def probed(session: Session, rollouts: Rollouts, step: int, *, keeps_old: bool = False) -> Rollouts:
    """The same rollouts, their kept groups' heads with the numbers that the algorithm's probes find. Collective.

    With `keeps_old` a later step learns from them: the log-probs under the policy's weights of now, which wrote them,
    are kept where an objective needs old ones. A group is dropped where a server gives no log-probs of one of its
    samples. Raises on all ranks `TrainingStopped` where a probe wants what the settings do not declare or finds more
    numbers than it may, and as `served.measure`.
    """
    probes = session.algorithm.probes(step)
    declared.stop_at(declared.of_probes(probes, session.config))
    kinds = {head.key.kind for group in rollouts.kept.groups for head in group.heads}
    wanted = {
        kind for kind in sorted(kinds) if any(one.old and one.trains(kind) for one in session.algorithm.objectives)
    }
    for one in _passes(probes, sorted(wanted) if keeps_old else ()):
        with session.clock.phase("probes" if one.probes else "old_log_probs"):
            rollouts = _with_pass(session, rollouts, one)
    return rollouts


def _passes(probes: Sequence[Probe], kept: Sequence[str]) -> Iterator[_Pass]:
    """The passes for probes, and for old log-probs of the kinds that are `kept`. Probes that look at the same samples
    under the same weights share one, unless their influences differ."""
    by_samples: dict[tuple[str, str], list[Probe]] = {(POLICY, kind): [] for kind in kept}
    for probe in probes:
        by_samples.setdefault((probe.parameters, probe.kind), []).append(probe)
    for (parameters, kind), mine in by_samples.items():
        plain = [one for one in mine if not isinstance(one.measures, Influence)]
        influences = list(dict.fromkeys(one.measures for one in mine if isinstance(one.measures, Influence)))
        for number, influence in enumerate(influences or [None]):
            served = [*(plain if not number else ()), *(one for one in mine if one.measures == influence)]
            keeps_old = not number and parameters == POLICY and kind in kept
            yield _Pass(parameters, kind, tuple(served), influence, keeps_old)


def _with_pass(session: Session, rollouts: Rollouts, asked: _Pass) -> Rollouts:
    """The rollouts with what a pass finds. Collective."""
    heads = [(group, head) for group in rollouts.kept.groups for head in group.of(asked.kind)]
    items = [Item(group, Trained(head, whole(head))) for group, head in heads]
    items, bare = [item for item in items if item.trained.spans], [item for item in items if not item.trained.spans]
    shares = balance([item.length for item in items], session.grid.data)
    placed = [[items[position] for position in share] for share in shares]
    (sequences,) = deliver(rollouts.bodies, [placed], session.config, session.world, routing_of(session))
    values, counters = _measured(session, sequences, asked)
    for probe in asked.probes:
        # A sample without a token of its own has no number.
        numbers: dict[Key, tuple[float, ...]] = {item.trained.head.key: () for item in bare}
        for number, item in enumerate(placed[session.grid.data_rank] if session.grid.reports else ()):
            one = values.of(probe, number)
            if one is not None:
                numbers[item.trained.head.key] = tuple(map(float, probe.reduce(one, sequences[number])))
        rollouts = rollouts._replace(kept=_told(probe, rollouts.kept, numbers, counters))
        counters = {}
    if not asked.keeps_old:
        return rollouts
    return _with_old(rollouts, asked.kind, _to_holders(session, placed, values.log_probs))


def _measured(session: Session, sequences: Sequence[records.Sequence], asked: _Pass) -> tuple[_Values, dict[str, int]]:
    """What is asked for of this replica's sequences, and what was counted of servers. Collective."""
    if asked.influence is None and all(probe.measures == "log_probs" for probe in asked.probes):
        served = log_probs_under(session, sequences, asked.parameters)
        return _Values(served.values), served.counters
    steps, influence = None, asked.influence
    if influence is not None:
        steps = [np.array([0, *influence.steps(one)]) for one in sequences]
    found = session.policy.survey(sequences, steps, None if influence is None else influence.settings)
    if found.influence_seconds:
        session.clock.count("influence", found.influence_seconds)
    return _Values(found.log_probs, found.entropies, found.influences), {}


def _told(probe: Probe, kept: Kept, mine: dict[Key, tuple[float, ...]], counters: dict[str, int]) -> Kept:
    """The kept groups with what the ranks have found by a probe. Collective."""
    most = max((len(one) for one in mine.values()), default=0)
    # What is too much is not sent.
    told = gather_all(_Found({}, most) if most > probe.most else _Found(mine))
    beyond = max(one.beyond for one in told)
    if beyond:
        too_many = Refusal(
            f"probe {probe.name!r} with {beyond} numbers of one sample",
            f"must find {probe.most} at most, since every rank gets them",
            "reduce what is measured further, or set Probe.most to what credit needs",
        )
        declared.stop_at([too_many])
    return kept.measured(probe, {key: values for one in told for key, values in one.numbers.items()}, counters)


def _to_holders(
    session: Session, placed: Sequence[Sequence[Item]], log_probs: Sequence[np.ndarray | None]
) -> dict[Key, np.ndarray]:
    """Log-probs (T,) of the samples that this rank holds, from the ranks that have measured them. Collective.

    `placed` are the samples by data-parallel rank, in the order of the `log_probs` that this one has.
    """
    world, mine = session.world, placed[session.grid.data_rank]
    nothing = np.empty(0, np.int32)
    outgoing = [nothing] * world.size
    if session.grid.reports:
        for rank in range(world.size):
            parts = [
                one.view(np.int32)
                for item, one in zip(mine, log_probs, strict=True)
                if one is not None and item.trained.head.holder == rank
            ]
            outgoing[rank] = np.concatenate([nothing, *parts])
    incoming: list[list[Item]] = []
    for rank in range(world.size):
        grid = grid_of_rank(rank, world.size, session.config.parallel)
        held = placed[grid.data_rank] if grid.reports else ()
        incoming.append([item for item in held if item.trained.head.holder == world.rank])
    received = send_arrays(outgoing, [sum(item.trained.tokens for item in items) for items in incoming])
    found: dict[Key, np.ndarray] = {}
    for items, array in zip(incoming, received, strict=True):
        ends = np.cumsum([item.trained.tokens for item in items])
        found |= zip((item.trained.head.key for item in items), np.split(array.view(np.float32), ends), strict=False)
    return found


def _with_old(rollouts: Rollouts, kind: str, old: Mapping[Key, np.ndarray]) -> Rollouts:
    """The rollouts whose trajectories of a kind have old log-probs, `old` of those that this rank holds."""
    bodies, groups = dict(rollouts.bodies), []
    for group in rollouts.kept.groups:
        heads = [
            head if head.key.kind != kind else dataclasses.replace(head, old_known=head.length) for head in group.heads
        ]
        groups.append(dataclasses.replace(group, heads=tuple(heads)))
        for head in heads:
            if head.key in old:
                bodies[head.key] = _body_with_old(head, bodies[head.key], old[head.key])
    return rollouts._replace(kept=dataclasses.replace(rollouts.kept, groups=tuple(groups)), earlier=bodies)


def _body_with_old(head: Head, body: Body, log_probs: np.ndarray) -> Body:
    whole_response = np.full(head.length, np.nan, np.float32)
    places = [np.arange(span.start, span.end) for span in Trained(head, whole(head)).spans]
    whole_response[np.concatenate(places)] = log_probs
    return dataclasses.replace(body, old_log_probs=tuple(whole_response.tolist()))
