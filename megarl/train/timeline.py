"""Where each rank's time and memory went, step by step: lines of phases.jsonl, and the numbers of a step from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from megarl.parallel.exchange import gather_to_first
from megarl.train.clock import Interval
from megarl.train.inference import Traffic
from megarl.train.session import Session

#: Ranks that a line has at most: the slowest and the fastest in each phase, the others evenly spread. Our choice, so
#: that the file of a large run stays small.
RANKS = 64


class RankTimes(NamedTuple):
    """One rank's phases since the last line, its memory at the end of these in bytes, and its weight pushes."""

    intervals: list[Interval]
    memory: dict[str, int]
    traffic: Traffic

    def seconds(self) -> dict[str, float]:
        """By phase; what one phase has inside of another counts for both."""
        found: dict[str, float] = {}
        for one in self.intervals:
            found[one.name] = found.get(one.name, 0.0) + one.seconds
        return found


def record(session: Session, step: int, kind: str) -> dict[str, Any]:
    """Record where the ranks' time went since the last line, which a "step" or an "evaluation" of this step was.

    Returns what of it belongs into the step's line of metrics.jsonl, on rank 0; nothing on the others. Collective.
    """
    mine = RankTimes(session.clock.take_intervals(), session.memory.held, session.inference.take_traffic())
    ranks = gather_to_first(mine)
    session.clock.align()
    if not ranks:
        return {}
    session.recorder.phases(line_of(step, kind, ranks))
    received = [one.traffic.received_bytes for one in ranks]
    pushes = max(one.traffic.pushes for one in ranks)
    return {"weight_push": {"pushes": pushes, "bytes": sum(received), "most_bytes": max(received)}} if pushes else {}


def line_of(step: int, kind: str, ranks: Sequence[RankTimes]) -> dict[str, Any]:
    """A line of phases.jsonl.

    `slowest` and `fastest` are the seconds of any rank by phase, `push_seconds` those of the slowest in weight pushes
    alone; `ranks` some by their number, with phases as name, start and seconds.
    """
    by_rank = [one.seconds() for one in ranks]
    names = list(dict.fromkeys(name for one in by_rank for name in one))
    times = {name: [one.get(name, 0.0) for one in by_rank] for name in names}
    return {
        "step": step,
        "kind": kind,
        "world": len(ranks),
        "slowest": {name: round(max(seconds), 4) for name, seconds in times.items()},
        "fastest": {name: round(min(seconds), 4) for name, seconds in times.items()},
        "push_seconds": round(max(one.traffic.seconds for one in ranks), 4),
        "ranks": {str(number): _rank(ranks[number]) for number in _chosen(times, len(ranks))},
    }


def _chosen(times: dict[str, list[float]], count: int) -> list[int]:
    """The numbers of the ranks that a line has, ascending."""
    if count <= RANKS:
        return list(range(count))
    extremes = {seconds.index(most(seconds)) for seconds in times.values() for most in (max, min)}
    even = [count * place // RANKS for place in range(RANKS)]
    return sorted([*extremes, *[one for one in even if one not in extremes][: max(0, RANKS - len(extremes))]])


def _rank(times: RankTimes) -> dict[str, Any]:
    push = times.traffic
    return {
        "phases": [[one.name, round(one.start, 4), round(one.seconds, 4)] for one in times.intervals],
        "memory": times.memory,
        "push": {"sent": push.sent_bytes, "received": push.received_bytes, "seconds": round(push.seconds, 4)},
    }
