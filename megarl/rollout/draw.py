"""Which replica generates what.

Every rank knows all requests of a call; a work source tells a replica the indices that are its own.
All ranks of a replica must be told the same at the same point of their loops, or their engines
would schedule different batches and wait for each other for ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store


class WorkSource(Protocol):
    """Hands out request indices until there are none left."""

    def draw(self) -> Sequence[int] | None:
        """The next chunk of indices, or None when the work is used up (and for ever after)."""
        ...


class FixedAssignment:
    """Work assigned in advance, round robin by request order: replica r of R gets r, r+R, r+2R, …

    No communication; what a replica's batches look like is the same in every run.
    """

    def __init__(self, total: int, replica: int, num_replicas: int) -> None:
        self._mine: range | None = range(replica, total, num_replicas)

    def draw(self) -> Sequence[int] | None:
        """All of the replica's indices at the first call."""
        mine, self._mine = self._mine, None
        return mine if mine else None


class OwnFirst:
    """Work of this replica alone, before what `rest` gives it: the indices `own` of a call, its requests after those
    that `rest` deals out."""

    def __init__(self, own: Sequence[int], rest: WorkSource) -> None:
        self._own: Sequence[int] | None = own
        self._rest = rest

    def draw(self) -> Sequence[int] | None:
        """All of the replica's own at the first call."""
        own, self._own = self._own, None
        return own or self._rest.draw()


class SharedCounter:
    """Chunks of consecutive indices, drawn by whichever replica asks first.

    The counter is one key of the rendezvous store, advanced by its atomic add. A replica's first rank
    draws and broadcasts the chunk's number over `group` (gloo; None for replicas of one rank).
    `key` must be new for every call and equal on all ranks.
    """

    def __init__(self, store: Store, key: str, total: int, chunk: int, group: dist.ProcessGroup | None) -> None:
        self._store = store
        self._key = key
        self._total = total
        self._chunk = chunk
        self._group = group
        self._exhausted = False

    def draw(self) -> Sequence[int] | None:
        """The next chunk; collective over the replica's ranks."""
        if self._exhausted:
            return None
        start = self._draw_number() * self._chunk
        if start >= self._total:
            self._exhausted = True
            return None
        return range(start, min(start + self._chunk, self._total))

    def _draw_number(self) -> int:
        if self._group is None:
            return self._store.add(self._key, 1) - 1
        number = torch.zeros(1, dtype=torch.int64)
        if dist.get_rank(self._group) == 0:
            number[0] = self._store.add(self._key, 1) - 1
        dist.broadcast(number, group=self._group, group_src=0)
        return int(number)
