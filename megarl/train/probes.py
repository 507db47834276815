"""What an algorithm wants to know of the kept groups before it gives credit, measured where the samples' tokens are."""

from __future__ import annotations

from megarl.algorithms.base import Trained, whole
from megarl.algorithms.plan import Probe
from megarl.data.packing import balance
from megarl.parallel.exchange import gather_all
from megarl.records import Key
from megarl.train.groups import Rollouts
from megarl.train.route import Item, deliver
from megarl.train.selection import routing_of
from megarl.train.session import Session

#: Numbers by probe, of each sample.
_Numbers = dict[Key, dict[str, tuple[float, ...]]]


def probed(session: Session, rollouts: Rollouts, step: int) -> Rollouts:
    """The same rollouts, their kept groups' heads with the numbers that the algorithm's probes find. Collective."""
    numbers: _Numbers = {}
    for probe in session.algorithm.probes(step):
        with session.clock.phase("probes"):
            for mine in gather_all(_measured(session, rollouts, probe)):
                for key, found in mine.items():
                    numbers.setdefault(key, {})[probe.name] = found
    return rollouts._replace(kept=rollouts.kept.measured(numbers)) if numbers else rollouts


def _measured(session: Session, rollouts: Rollouts, probe: Probe) -> dict[Key, tuple[float, ...]]:
    """What the probe finds of this rank's share of the samples; nothing on ranks that another one reports for. Of a
    sample without a token of its own it finds no number."""
    asked = [Item(group, Trained(h, whole(h))) for group in rollouts.kept.groups for h in group.of(probe.kind)]
    items = [item for item in asked if item.trained.spans]
    shares = balance([item.length for item in items], session.grid.data)
    placed = [[items[position] for position in share] for share in shares]
    (sequences,) = deliver(rollouts.made.bodies, [placed], session.config, session.world, routing_of(session))
    values = session.policy.measure(sequences, probe.parameters) or []
    if not session.grid.reports:
        return {}
    mine = placed[session.grid.data_rank]
    found: dict[Key, tuple[float, ...]] = {item.trained.head.key: () for item in asked if not item.trained.spans}
    for item, one in zip(mine, values, strict=True):
        found[item.trained.head.key] = tuple(float(number) for number in probe.reduce(one))
    return found
