"""What an algorithm wants to know of the kept groups before it gives credit, measured where the samples' tokens are."""

from __future__ import annotations

from typing import NamedTuple

from megarl.algorithms import declared
from megarl.algorithms.base import Trained, whole
from megarl.algorithms.plan import Probe
from megarl.data.packing import balance
from megarl.errors import Refusal
from megarl.parallel.exchange import gather_all
from megarl.records import Key
from megarl.train.groups import Rollouts
from megarl.train.route import Item, deliver
from megarl.train.selection import routing_of
from megarl.train.session import Session
from megarl.train.values import log_probs_under


class _Found(NamedTuple):
    """What a rank tells the others of a probe: the numbers of its samples, and how many were the most of one that had
    more than the probe says."""

    numbers: dict[Key, tuple[float, ...]]
    beyond: int = 0


def probed(session: Session, rollouts: Rollouts, step: int) -> Rollouts:
    """The same rollouts, their kept groups' heads with the numbers that the algorithm's probes find. Collective.

    A group is dropped where a server gives no log-probs of one of its samples. Raises on all ranks `TrainingStopped`
    where a probe wants what the settings do not declare or finds more numbers than it may, and as `served.measure`.
    """
    probes = session.algorithm.probes(step)
    declared.stop_at(declared.of_probes(probes, session.config))
    for probe in probes:
        with session.clock.phase("probes"):
            found, counters = _measured(session, rollouts, probe)
            told = gather_all(found)
        beyond = max(one.beyond for one in told)
        if beyond:
            too_many = Refusal(
                f"probe {probe.name!r} with {beyond} numbers of one sample",
                f"must find {probe.most} at most, since every rank gets them",
                "reduce the log-probs further, or set Probe.most to what credit needs",
            )
            declared.stop_at([too_many])
        numbers = {key: values for one in told for key, values in one.numbers.items()}
        rollouts = rollouts._replace(kept=rollouts.kept.measured(probe, numbers, counters))
    return rollouts


def _measured(session: Session, rollouts: Rollouts, probe: Probe) -> tuple[_Found, dict[str, int]]:
    """What the probe finds of this rank's share of the samples, nothing on ranks that another one reports for, and
    what was counted on the way. Of a sample without a token of its own it finds no number."""
    asked = [Item(group, Trained(h, whole(h))) for group in rollouts.kept.groups for h in group.of(probe.kind)]
    items = [item for item in asked if item.trained.spans]
    shares = balance([item.length for item in items], session.grid.data)
    placed = [[items[position] for position in share] for share in shares]
    (sequences,) = deliver(rollouts.made.bodies, [placed], session.config, session.world, routing_of(session))
    values, counters = log_probs_under(session, sequences, probe.parameters)
    if not session.grid.reports:
        return _Found({}), counters
    mine = placed[session.grid.data_rank]
    numbers: dict[Key, tuple[float, ...]] = {item.trained.head.key: () for item in asked if not item.trained.spans}
    for item, one in zip(mine, values, strict=True):
        if one is not None:
            numbers[item.trained.head.key] = tuple(float(number) for number in probe.reduce(one))
    most = max((len(one) for one in numbers.values()), default=0)
    # What is too much is not sent.
    return (_Found({}, most) if most > probe.most else _Found(numbers)), counters
