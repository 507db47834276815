"""What the ranks of a run say of themselves through the store, and what one of them has heard of the others."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch._C._distributed_c10d import Store

from megarl.config.health import HealthSettings
from megarl.health import stacks
from megarl.health.judgement import Beat, Seen
from megarl.health.phase_mark import phase_of
from megarl.parallel import progress
from megarl.parallel.processes import identity


@dataclass(frozen=True, slots=True)
class _Heard:
    """The last beat of a rank, when it came, and the identity of its process where that is on this host."""

    beat: Beat
    when: float
    process: str | None


class Beats:
    """One rank's side. `waits`: seconds, by phase, beyond its limit; `left`: set when this rank ends its watch.

    Methods that speak to the store raise `RuntimeError` where it is gone.
    """

    def __init__(
        self, store: Store, settings: HealthSettings, rank: int, waits: Mapping[str, float], left: threading.Event
    ) -> None:
        self._store, self._settings, self._rank, self._waits, self._left = store, settings, rank, waits, left
        self._host, self._pid = socket.gethostname(), os.getpid()
        self._count = 0
        self._saying = threading.Lock()
        self._heard: dict[int, _Heard] = {}

    def say(self) -> None:
        """Say where this rank is, and that it is."""
        # The last beat is the one that says that this rank leaves.
        with self._saying:
            now = progress.CURRENT
            stand = stacks.stand_of_main_thread()
            self._count += 1
            beat = Beat(
                rank=self._rank,
                host=self._host,
                pid=self._pid,
                count=self._count,
                phase=now.phase,
                number=now.number,
                idle=time.monotonic() - now.moved,
                limit=self._limit(now.phase),
                waits_in=stand.waits_in,
                at=stand.at,
                left=self._left.is_set(),
            )
            self._store.set(f"beat/{self._rank}", json.dumps(asdict(beat)))

    def _limit(self, phase: Any) -> float:
        settings = self._settings
        if phase in settings.limits:
            return settings.limits[phase]
        longest = progress.CURRENT.longest.get(phase)
        known = settings.first_limit if longest is None else max(settings.least_limit, settings.scale * longest)
        return known + self._waits.get(phase, 0.0)

    def hear(self, ranks: Sequence[int]) -> None:
        """Read what these ranks have said last."""
        found = self._store.multi_get([f"beat/{rank}" for rank in ranks])
        now = time.monotonic()
        for rank, text in zip(ranks, found, strict=True):
            beat = Beat(**json.loads(text))
            before = self._heard.get(rank)
            if before is None:
                self._heard[rank] = _Heard(beat, now, identity(beat.pid) if beat.host == self._host else None)
            elif beat.count != before.beat.count:
                self._heard[rank] = replace(before, beat=beat, when=now)

    def seen(self) -> list[Seen]:
        """All ranks that were heard, as they are now."""
        # A list first: the thread that works may ask while the one that watches hears of more.
        return [self._seen(heard) for heard in list(self._heard.values())]

    def _seen(self, heard: _Heard) -> Seen:
        beat = heard.beat
        silent = max(0.0, time.monotonic() - heard.when - 2 * self._settings.interval)
        here = heard.process is not None
        dead = here and not beat.left and identity(beat.pid) != heard.process
        if here and (dead or silent > 0) and (phase := phase_of(beat.pid)) not in (None, beat.phase):
            # It got no further than to enter that phase: what else it said is of the one before.
            beat = replace(beat, phase=phase, waits_in=None)
        return Seen(beat, silent, dead)

    def last(self, rank: int) -> Beat | None:
        """The last that was heard of a rank."""
        return self._heard[rank].beat if rank in self._heard else None

    def excuse(self, seconds: float) -> None:
        """Count that time as no silence of anybody: this process itself stood still."""
        self._heard = {rank: replace(heard, when=heard.when + seconds) for rank, heard in self._heard.items()}
