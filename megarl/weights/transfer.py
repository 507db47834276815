"""Executes a reshard plan: boxes of source tensors travel point to point into boxes of target tensors.

Transfers go in rounds of bounded size, in layer order; the pieces for one peer travel together in one flat message.
While a round travels, the one before it is copied to its place: a rank never holds more than two rounds beside its
own tensors.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist

from megarl.errors import MegarlError
from megarl.parallel.exchange import gather_all
from megarl.reshard.copying import box_view, copy_box
from megarl.reshard.plan import Plan, Transfer


class Target(Protocol):
    """Where a plan writes on this rank."""

    def buffer(self, name: str) -> torch.Tensor:
        """The tensor to write `name` into; asked for at its first piece."""
        ...

    def complete(self, name: str) -> None:
        """All pieces of `name` have been written."""
        ...


class PushError(MegarlError):
    """What arrived differs from what was sent; names both ranks."""


class Mover:
    """Runs one plan again and again; `dtype` is the type that travels: sources are cast before sending.

    `bucket_bytes` bounds what a rank sends and receives in one round.
    """

    def __init__(self, plan: Plan, rank: int, *, bucket_bytes: int, dtype: torch.dtype, device: torch.device) -> None:
        self.rank, self.dtype, self.device = rank, dtype, device
        #: Bytes that arrived from other ranks in the last run.
        self.received_bytes = 0
        self.rounds = [_Round(part, rank) for part in plan.buckets(max(1, bucket_bytes // dtype.itemsize))]
        # Bits sent to, and arrived from, each rank; the own one for copies. None where nobody asks.
        self._sums: tuple[dict[int, int], dict[int, int]] | None = None
        self._pieces: dict[str, int] = defaultdict(int)
        for one in self.rounds:
            for transfer in one.arriving():
                self._pieces[transfer.target_name] += 1

    def run(self, sources: Mapping[str, torch.Tensor], target: Target, *, verify: bool = False) -> None:
        """Move everything once; called by all ranks together.

        With `verify` sums over the bits that leave and over those that lie in their places are compared, pair by pair
        of ranks. Raises `PushError` on all ranks where they differ.
        """
        left = dict(self._pieces)
        self.received_bytes = 0
        self._sums = (defaultdict(int), defaultdict(int)) if verify else None
        largest = max((one.size for one in self.rounds), default=0)
        buffers = [torch.empty(largest, dtype=self.dtype, device=self.device) for _ in range(min(2, len(self.rounds)))]
        before: tuple[_Round, torch.Tensor, list[Any]] | None = None
        with torch.no_grad():
            for number, one in enumerate(self.rounds):
                buffer = buffers[number % 2]
                requests = self._start(one, sources, buffer)
                if before is not None:
                    self._land(*before, sources, target, left)
                before = one, buffer, requests
            if before is not None:
                self._land(*before, sources, target, left)
        if self._sums is not None:
            _compare([(dict(sent), dict(arrived)) for sent, arrived in gather_all(self._sums)])

    def _start(self, one: _Round, sources: Mapping[str, torch.Tensor], buffer: torch.Tensor) -> list[Any]:
        """Pack and post a round. Its messages lie in `buffer` one after another, first those to receive."""
        operations: list[dist.P2POp] = []
        offset = 0
        for peer, transfers in one.receives.items():
            size = sum(t.numel for t in transfers)
            operations.append(dist.P2POp(dist.irecv, buffer[offset : offset + size], peer))
            offset += size
        for peer, transfers in one.sends.items():
            start = offset
            for t in transfers:
                piece = box_view(sources[t.source_name], t.source_box)
                buffer[offset : offset + t.numel].view(piece.shape).copy_(piece)
                offset += t.numel
            if self._sums is not None:
                self._sums[0][peer] += _sum(buffer[start:offset])
            operations.append(dist.P2POp(dist.isend, buffer[start:offset], peer))
        return self._post(operations)

    def _post(self, operations: list[dist.P2POp]) -> list[Any]:
        return dist.batch_isend_irecv(operations) if operations else []

    def _land(
        self,
        one: _Round,
        buffer: torch.Tensor,
        requests: list[Any],
        sources: Mapping[str, torch.Tensor],
        target: Target,
        left: dict[str, int],
    ) -> None:
        """Copy a round's pieces to their places, first those that were here all along."""
        for t in one.local:
            source, found = sources[t.source_name].to(self.dtype), target.buffer(t.target_name)
            copy_box(found, t.target_box, source, t.source_box)
            if self._sums is not None and found.dtype == self.dtype:
                self._sums[0][self.rank] += _sum(box_view(source, t.source_box))
                self._sums[1][self.rank] += _sum(box_view(found, t.target_box))
        for request in requests:
            request.wait()
        offset = 0
        for peer, transfers in one.receives.items():
            for t in transfers:
                view = box_view(target.buffer(t.target_name), t.target_box)
                part = buffer[offset : offset + t.numel]
                view.copy_(part.view(view.shape))
                offset += t.numel
                if self._sums is not None:
                    # A tensor of another type has other bits: there what arrived counts.
                    self._sums[1][peer] += _sum(view if view.dtype == self.dtype else part)
        self.received_bytes += offset * self.dtype.itemsize
        for t in one.arriving():
            left[t.target_name] -= 1
            if left[t.target_name] == 0:
                target.complete(t.target_name)


def _sum(tensor: torch.Tensor) -> int:
    """The sum of the elements' bits, read as whole numbers."""
    kind = {1: torch.int8, 2: torch.int16, 4: torch.int32}[tensor.element_size()]
    return int(tensor.view(kind).sum(dtype=torch.int64))


def _compare(ranks: list[tuple[dict[int, int], dict[int, int]]]) -> None:
    """Raise `PushError` for the first pair of ranks whose sums differ; `ranks`: sent and arrived, by peer, of each."""
    for source, (sent, _) in enumerate(ranks):
        for target, (_, arrived) in enumerate(ranks):
            if sent.get(target, 0) != arrived.get(source, 0):
                raise PushError(
                    f"weight push: what rank {source} sent to rank {target} is not what lies in rank {target}'s "
                    "engine. The policy's weights are unharmed. Fix: start again from the last checkpoint, without the "
                    "host of one of the two ranks if it happens again"
                )


class _Round:
    """One round as this rank sees it: what it sends and receives by peer, and what it copies. `size`: elements in
    messages."""

    def __init__(self, transfers: tuple[Transfer, ...], rank: int) -> None:
        self.sends: dict[int, list[Transfer]] = defaultdict(list)
        self.receives: dict[int, list[Transfer]] = defaultdict(list)
        self.local: list[Transfer] = []
        self.size = 0
        for transfer in transfers:
            if transfer.source == transfer.target == rank:
                self.local.append(transfer)
            elif transfer.source == rank:
                self.sends[transfer.target].append(transfer)
                self.size += transfer.numel
            elif transfer.target == rank:
                self.receives[transfer.source].append(transfer)
                self.size += transfer.numel

    def arriving(self) -> list[Transfer]:
        """Pieces written on this rank, in layer order within each origin."""
        return [*self.local, *(t for transfers in self.receives.values() for t in transfers)]
