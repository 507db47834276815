"""Executes a reshard plan: boxes of source tensors travel point to point into boxes of target tensors.

Transfers go in buckets of bounded size, in layer order; the pieces for one peer travel together in one
flat message. No rank ever holds more than one bucket beside its own tensors.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Protocol

import torch
import torch.distributed as dist

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


class Mover:
    """Runs one plan again and again; `dtype` is the type that travels: sources are cast before sending."""

    def __init__(self, plan: Plan, rank: int, *, bucket_bytes: int, dtype: torch.dtype, device: torch.device) -> None:
        self.rank, self.dtype, self.device = rank, dtype, device
        #: Bytes that arrived from other ranks in the last run.
        self.received_bytes = 0
        element = torch.empty((), dtype=dtype).element_size()
        self.buckets = [_Bucket(part, rank) for part in plan.buckets(max(1, bucket_bytes // element))]
        self._pieces: dict[str, int] = defaultdict(int)
        for bucket in self.buckets:
            for transfer in bucket.arriving():
                self._pieces[transfer.target_name] += 1

    def run(self, sources: Mapping[str, torch.Tensor], target: Target) -> None:
        """Move everything once; called by all ranks together."""
        left = dict(self._pieces)
        self.received_bytes = 0
        with torch.no_grad():
            for bucket in self.buckets:
                self._run_bucket(bucket, sources, target)
                for transfer in bucket.arriving():
                    left[transfer.target_name] -= 1
                    if left[transfer.target_name] == 0:
                        target.complete(transfer.target_name)

    def _run_bucket(self, bucket: _Bucket, sources: Mapping[str, torch.Tensor], target: Target) -> None:
        operations: list[dist.P2POp] = []
        incoming: dict[int, torch.Tensor] = {}
        for peer, transfers in bucket.sends.items():
            pieces = [box_view(sources[t.source_name], t.source_box).reshape(-1).to(self.dtype) for t in transfers]
            operations.append(dist.P2POp(dist.isend, torch.cat(pieces), peer))
        for peer, transfers in bucket.receives.items():
            size = sum(t.numel for t in transfers)
            incoming[peer] = torch.empty(size, dtype=self.dtype, device=self.device)
            operations.append(dist.P2POp(dist.irecv, incoming[peer], peer))
        requests = dist.batch_isend_irecv(operations) if operations else []
        # What is already here is copied while the rest travels.
        for t in bucket.local:
            copy_box(target.buffer(t.target_name), t.target_box, sources[t.source_name].to(self.dtype), t.source_box)
        for request in requests:
            request.wait()
        for peer, transfers in bucket.receives.items():
            self.received_bytes += incoming[peer].nbytes
            parts = incoming[peer].split([t.numel for t in transfers])
            for t, part in zip(transfers, parts, strict=True):
                view = box_view(target.buffer(t.target_name), t.target_box)
                view.copy_(part.view(view.shape))


class _Bucket:
    """One bucket as this rank sees it: what it sends and receives by peer, and what it copies."""

    def __init__(self, transfers: tuple[Transfer, ...], rank: int) -> None:
        self.sends: dict[int, list[Transfer]] = defaultdict(list)
        self.receives: dict[int, list[Transfer]] = defaultdict(list)
        self.local: list[Transfer] = []
        for transfer in transfers:
            if transfer.source == transfer.target == rank:
                self.local.append(transfer)
            elif transfer.source == rank:
                self.sends[transfer.target].append(transfer)
            elif transfer.target == rank:
                self.receives[transfer.source].append(transfer)

    def arriving(self) -> list[Transfer]:
        """Pieces written on this rank, in layer order within each origin."""
        return [*self.local, *(t for transfers in self.receives.values() for t in transfers)]
