"""Likelihoods under the policy as it is: those that an algorithm wants to see logged."""

from __future__ import annotations

import numpy as np

from megarl.algorithms.plan import Gauge, Plan
from megarl.parallel.exchange import gather_all
from megarl.records import Sequence, from_place
from megarl.train.groups import Rollouts
from megarl.train.session import Session

#: By metric: a sum, and what it is to be divided by.
_Sums = dict[str, tuple[float, int]]


def measure(session: Session, plan: Plan, rollouts: Rollouts) -> dict[str, float]:
    """Means of what the algorithm's gauges of the first kept groups ask for, by name; see `Gauge`. Collective."""
    groups = rollouts.kept.groups[: plan.gauged]
    if not plan.gauged:
        return {}
    with session.clock.phase("gauges"):
        found = [
            (place, gauge)
            for place, group in enumerate(groups)
            for gauge in session.algorithm.gauges(group, rollouts.held(group, session.world.rank))
        ]
        # Every rank needs the few of its replica's share; which those are does not matter.
        parts = gather_all([(place, gauge) for place, gauge in found if not gauge.common])
        gauges = sorted((one for part in parts for one in part), key=_order)
        gauges += [(place, gauge) for place, gauge in found if gauge.common]
        mine = gauges[session.grid.data_rank :: session.grid.data]
        sums = _sums(session, [(rollouts.kept.groups[place].prompt.token_ids, gauge) for place, gauge in mine])
        return _means(gather_all(sums if session.grid.reports else {}))


def _order(one: tuple[int, Gauge]) -> tuple[list[str], int, tuple[int, ...]]:
    place, gauge = one
    return sorted(gauge.parts), place, gauge.token_ids


def _sums(session: Session, gauges: list[tuple[tuple[int, ...], Gauge]]) -> _Sums:
    limit = session.config.batch.tokens_per_microbatch
    short = [(prompt, gauge) for prompt, gauge in gauges if len(prompt) + len(gauge.token_ids) <= limit]
    sequences = [
        Sequence(
            np.array([*prompt, *gauge.token_ids], np.int32),
            from_place(len(prompt), len(prompt) + len(gauge.token_ids)),
            temperature=session.config.rollout.temperature,
        )
        for prompt, gauge in short
    ]
    sums: _Sums = {}
    for (_, gauge), values in zip(short, session.policy.measure(sequences) or [], strict=False):
        for name, (start, end) in gauge.parts.items():
            total, count = sums.get(name, (0.0, 0))
            value = float(values[start:end].sum())
            sums[name] = (total - value, count + end - start) if name.endswith("_nll") else (total + value, count + 1)
    return sums


def _means(parts: list[_Sums]) -> dict[str, float]:
    values: dict[str, float] = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        found = [part[name] for part in parts if name in part]
        count = sum(one for _, one in found)
        if count:
            values[name] = sum(total for total, _ in found) / count
    return values
