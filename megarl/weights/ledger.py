"""What left ranks and what lies where it went, piece by piece: a digest of each, compared after a push."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import xxhash

from megarl.ops.bits import Digest, as_numbers, digest
from megarl.parallel.exchange import gather_all
from megarl.reshard.boxes import Box
from megarl.reshard.plan import Transfer


class Journey(NamedTuple):
    """A box of a target tensor, and the ranks between which it went."""

    source: int
    target: int
    name: str
    box: Box


class Ledger:
    """One rank's digests of a run of its plan; every run notes the same pieces in the same order.

    Where all agree, one number goes around: the sum, over all ranks, of what was sent less what arrived, each digest
    times a number that stands for its journey. It is 0 then; that it is by chance with anything wrong has a
    probability of 2^-64. Only where it is not do ranks tell each other the digests.
    """

    def __init__(self) -> None:
        self._sent: list[Digest] = []
        self._arrived: list[Digest] = []
        # A box of a source goes to every replica of the engine, and is digested once.
        self._of_source: dict[tuple[str, Box], Digest] = {}
        # Of every run the same: learned in the first.
        self._sent_as: list[Journey] = []
        self._arrived_as: list[Journey] = []
        self._factors: tuple[np.ndarray, np.ndarray] | None = None

    def begin(self) -> None:
        """Forget the last run's digests."""
        self._sent, self._arrived, self._of_source = [], [], {}

    def sent(self, transfer: Transfer, piece: torch.Tensor) -> None:
        """Note a piece that leaves, or is copied from here."""
        source = transfer.source_name, transfer.source_box
        found = self._of_source.get(source)
        if found is None:
            found = self._of_source[source] = digest(piece)
        self._sent.append(found)
        if self._factors is None:
            self._sent_as.append(_journey(transfer))

    def arrived(self, transfer: Transfer, found: Digest) -> None:
        """Note the digest of a piece where it lies."""
        self._arrived.append(found)
        if self._factors is None:
            self._arrived_as.append(_journey(transfer))

    def first_difference(self) -> Journey | None:
        """A piece that is not what was sent, the same on all ranks, or None. Collective."""
        if self._factors is None:
            self._factors = _factors(self._sent_as), _factors(self._arrived_as)
        sent, arrived = as_numbers(self._sent), as_numbers(self._arrived)
        rest = np.array([(sent * self._factors[0]).sum()]) - np.array([(arrived * self._factors[1]).sum()])
        total = torch.from_numpy(rest.view(np.int64))
        dist.all_reduce(total)
        if not total.item():
            return None
        mine = (
            dict(zip(self._sent_as, sent.tolist(), strict=True)),
            dict(zip(self._arrived_as, arrived.tolist(), strict=True)),
        )
        all_sent: dict[Journey, int] = {}
        all_arrived: dict[Journey, int] = {}
        for left, came in gather_all(mine):
            all_sent |= left
            all_arrived |= came
        wrong = [one for one in all_sent | all_arrived if all_sent.get(one) != all_arrived.get(one)]
        # A fault on the way is likelier than one within a rank.
        return min(wrong, key=lambda one: (one.source == one.target, one))


def _journey(transfer: Transfer) -> Journey:
    return Journey(transfer.source, transfer.target, transfer.target_name, transfer.target_box)


def _factors(journeys: Sequence[Journey]) -> np.ndarray:
    """Odd, so that none loses a bit of the digest."""
    return np.array([xxhash.xxh3_64_intdigest(repr(tuple(one)).encode()) | 1 for one in journeys], np.uint64)
