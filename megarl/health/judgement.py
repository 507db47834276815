"""Who holds the run up: pure judgement over what every rank said of itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Cause = Literal["died", "silent", "stuck", "deadlock"]


@dataclass(frozen=True, slots=True)
class Beat:
    """What a rank says of itself, every so often. Times in seconds.

    `count` grows with every beat. `phase` is the rank's phase, its `number`-th; it made no progress for `idle`, of
    which `limit` are allowed. `waits_in`: the call in which it waits for other ranks, None where it works; `at`: its
    line of code. `left`: it ended by itself.
    """

    rank: int
    host: str
    pid: int
    count: int
    phase: str
    number: int
    idle: float
    limit: float
    waits_in: str | None
    at: str
    left: bool = False


@dataclass(frozen=True, slots=True)
class Seen:
    """A rank's last beat, and how that looks from here: for `silent` seconds no new one came; `dead`: its process is
    gone."""

    beat: Beat
    silent: float = 0.0
    dead: bool = False


@dataclass(frozen=True, slots=True)
class Verdict:
    """Who holds the run up, and why: `culprits` are their last beats; `others` are those of the rest."""

    cause: Cause
    culprits: tuple[Beat, ...]
    others: tuple[Beat, ...]
    silence: float

    def sentence(self) -> str:
        """The message that the run ends with, without what to do."""
        first = self.culprits[0]
        who = _name(self.culprits)
        many = len(self.culprits) > 1
        where = f"in phase {first.phase}"
        if self.cause == "died":
            said = f"{who} {'have' if many else 'has'} died {where}"
        elif self.cause == "silent":
            said = f"{who} gave no sign of life for {self.silence:.0f} s (health.silence) {where}"
        elif self.cause == "stuck":
            said = (
                f"{who} made no progress for {first.idle:.0f} s {where} (limit {first.limit:.0f} s, "
                f"health.limits.{first.phase}), at {first.at}"
            )
        else:
            said = f"all ranks wait for each other {where}; {who} in {first.waits_in} at {first.at}"
        waiting = [beat for beat in self.others if beat.waits_in is not None]
        last = (
            f", last seen in {first.waits_in} at {first.at}"
            if self.cause in ("died", "silent") and first.waits_in
            else ""
        )
        if waiting and self.cause != "deadlock":
            last += f"; rank {waiting[0].rank} waits in {waiting[0].waits_in} at {waiting[0].at}"
        return said + last


def judge(seen: Sequence[Seen], silence: float) -> Verdict | None:
    """Who holds the run up; None while nobody does.

    Somebody who works and has passed the limit of its phase; of several the one that is furthest behind. Or all wait
    for each other, and all too long. A rank that waits while another works is patient.
    """
    present = [one for one in seen if not one.beat.left]
    if dead := [one.beat for one in present if one.dead]:
        return _verdict("died", dead, present, 0.0)
    if silent := [one for one in present if one.silent > silence]:
        return _verdict("silent", [one.beat for one in silent], present, max(one.silent for one in silent))
    beats = [one.beat for one in present]
    late = [beat for beat in beats if beat.idle > beat.limit]
    if stuck := [beat for beat in late if beat.waits_in is None]:
        # Where GPUs are waited for, no stack tells who waits for whom: those behind the others are.
        furthest = min(beat.number for beat in stuck)
        return _verdict("stuck", [beat for beat in stuck if beat.number == furthest], present, 0.0)
    # What a rank does of which nothing was heard lately is not known: it may be the one that the others wait for.
    if beats and len(late) == len(beats) and not any(one.silent for one in present):
        furthest = min(beat.number for beat in late)
        return _verdict("deadlock", [beat for beat in late if beat.number == furthest], present, 0.0)
    return None


def _verdict(cause: Cause, culprits: Sequence[Beat], present: Sequence[Seen], silence: float) -> Verdict:
    ranks = {beat.rank for beat in culprits}
    return Verdict(cause, tuple(culprits), tuple(one.beat for one in present if one.beat.rank not in ranks), silence)


def _name(beats: Sequence[Beat]) -> str:
    """`rank 3 on n1`, or `ranks 2, 3 on n1`, of the first few."""
    by_host: dict[str, list[int]] = {}
    for beat in beats:
        by_host.setdefault(beat.host, []).append(beat.rank)
    parts = []
    for host, ranks in list(by_host.items())[:4]:
        shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
        parts.append(f"{'ranks' if len(ranks) > 1 else 'rank'} {shown} on {host}")
    return " and ".join(parts) + (" and more" if len(by_host) > 4 else "")
