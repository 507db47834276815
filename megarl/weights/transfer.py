"""Executes a reshard plan: boxes of source tensors travel point to point into boxes of target tensors.

Transfers go in rounds of bounded size; pieces for one peer travel together in flat messages, as bytes, each in its own
type. While a round travels, the one before it is copied to its place: beside its own tensors a rank never holds more
than the messages of two rounds, and of tensors that are computed, one.
"""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import count, groupby
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist

from megarl.errors import Interrupted, RankLost
from megarl.formats.huggingface import PRECISIONS
from megarl.ops.bits import Digest, digest
from megarl.ops.fp8 import E4M3
from megarl.parallel import progress
from megarl.parallel.absence import find_absent, meet
from megarl.reshard.boxes import Box
from megarl.reshard.copying import box_view
from megarl.reshard.plan import Message, Plan, Round, Transfer
from megarl.weights.ledger import Journey, Ledger
from megarl.weights.source import WeightSource


class Target(Protocol):
    """Where a plan writes on this rank."""

    def buffer(self, name: str) -> torch.Tensor:
        """The tensor to write `name` into; asked for at its first piece."""
        ...

    def complete(self, name: str) -> None:
        """All pieces of `name` have been written."""
        ...


class PushError(Interrupted):
    """A push that failed: what arrived differs from what was sent, or a rank is gone or silent. Names the ranks."""


class PushAbsence(PushError, RankLost):
    """A push that failed because a rank is gone or silent."""


#: The types that travel, in torch: `Kind` by name.
WIRE_TYPES = PRECISIONS | {"e4m3": E4M3}

#: Messages begin at a multiple of that many bytes in a round's buffer, at which elements of every type can be read.
_ALIGNMENT = 64

#: Movers are told apart by the order in which they are made.
_NUMBERS = count()


class Mover:
    """Runs one rank's plan again and again. Sources are cast to the type in which they travel before they are sent.

    `computed`: those of the source's tensors that it makes when they are asked for, each with a name for what it is
    made of. They are asked for side by side with what else is made of the same, and let go at once: none is sent from
    where it lies. `time_limit`: seconds that a rank waits for others, in a round and at the end. `occasion`: what the
    move is, for errors, and `say` what a piece is. All ranks must make their movers in the same order.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        device: torch.device,
        time_limit: float,
        computed: Mapping[str, str] = MappingProxyType({}),
        occasion: str = "weight push",
        say: Callable[[Journey], str] = lambda piece: piece.name,
    ) -> None:
        self.plan, self.device = plan, device
        self.time_limit, self.occasion, self._say = time_limit, occasion, say
        self._computed = computed
        self._number, self._runs = next(_NUMBERS), 0
        # NCCL has one request for a turn's messages: which of the peers is gone, it does not say.
        self._one_wait_for_all = device.type == "cuda"
        #: Bytes that arrived from other ranks, and that went to them, in the last run.
        self.received_bytes = self.sent_bytes = 0
        self._ledger = Ledger()
        self._verify = False
        #: Digests of what lies in the boxes of the targets' tensors after a run with `verify`.
        self.lying: dict[str, list[tuple[Box, Digest]]] = {}
        # Pieces of tensors that are not complete, with their digests where these are known.
        self._landed: dict[str, list[tuple[Transfer, torch.Tensor, Digest | None]]] = defaultdict(list)
        arriving = [t for one in plan.rounds for t in (*one.local, *one.arriving())]
        self._pieces = Counter(t.target_name for t in arriving)
        self._order = {name: number for number, name in enumerate(self._pieces)}

    def run(self, source: WeightSource, target: Target, *, verify: bool = False) -> None:
        """Move everything once; called by all ranks together.

        With `verify` digests of every piece that leaves, and of what lies in its place when its tensor is complete, are
        compared. Raises `PushError` on all ranks where they differ, and where one is gone or takes no part within the
        time limit.
        """
        self._runs += 1
        left = dict(self._pieces)
        self.received_bytes = self.sent_bytes = 0
        self._verify = verify
        self._ledger.begin()
        self._landed.clear()
        self.lying.clear()
        buffers = [_Buffer(self.device) for _ in range(2)]
        before: _Travelling | None = None
        sources = _Asked(source, self._computed)
        with torch.no_grad():
            for number, one in enumerate(self.plan.rounds):
                travelling = self._start(one, sources, target, buffers[number % 2])
                if before is not None:
                    self._land(before, sources, target, left)
                before = travelling
            if before is not None:
                self._land(before, sources, target, left)
        self._meet()
        if verify and (wrong := self._ledger.first_difference()) is not None:
            raise PushError(
                f"{self.occasion}: what rank {wrong.source} sent to rank {wrong.target} is not what lies in rank "
                f"{wrong.target}'s engine, in {self._say(wrong)}. The policy's weights are unharmed. Fix: "
                "start again from the last checkpoint, without the host of one of the two ranks if it happens again"
            )

    def _start(self, one: Round, sources: _Asked, target: Target, buffer: _Buffer) -> _Travelling:
        """Pack and post a round. What cannot leave or arrive in place goes through `buffer`."""
        messages = [(message, self._in_place(message, sources, target)) for message in one.messages]
        buffer.hold([message.nbytes for message, flat in messages if flat is None])
        operations: list[dist.P2POp] = []
        arriving: list[_Piece] = []
        leaving: list[_Leaving] = []
        for message, place in messages:
            flat = buffer.take(message.nbytes) if place is None else place
            parts = [(one, flat[start:stop].view(WIRE_TYPES[one.kind])) for one, start, stop in message.spans()]
            if message.incoming:
                arriving.extend(_Piece(transfer, part, place is not None) for transfer, part in parts)
                self.received_bytes += sum(part.nbytes for _, part in parts)
            else:
                leaving.extend(_Leaving(transfer, part, place is not None) for transfer, part in parts)
                self.sent_bytes += sum(part.nbytes for _, part in parts)
            operations.append(dist.P2POp(dist.irecv if message.incoming else dist.isend, flat, message.peer))
        pieces = [*self._pack(leaving, one.local, sources, target), *arriving]
        # Tensor by tensor, so that few are begun and not complete.
        pieces.sort(key=lambda piece: self._order[piece.transfer.target_name])
        return _Travelling(self._post(operations, one.messages), pieces)

    def _pack(
        self, leaving: Sequence[_Leaving], local: Sequence[Transfer], sources: _Asked, target: Target
    ) -> list[_Piece]:
        """Write what leaves in a round into its messages; the pieces that stay within the rank, written already where a
        computed tensor leaves too."""
        by_origin: dict[str, list[_Leaving]] = defaultdict(list)
        for one in leaving:
            by_origin[sources.origin(one.transfer.source_name)].append(one)
        staying: dict[str, list[Transfer]] = defaultdict(list)
        for transfer in local:
            if transfer.source_name in self._computed:
                staying[sources.origin(transfer.source_name)].append(transfer)
        copied: dict[Transfer, Digest | None] = {}
        for origin in sources.begun_first(by_origin):
            for transfer, part, in_place in by_origin[origin]:
                if not in_place:
                    _write(part, sources, transfer)
                if self._verify:
                    # It is still in the cache.
                    self._ledger.sent(transfer, part)
            copied |= {transfer: self._copy(transfer, sources, target) for transfer in staying[origin]}
        return [_Piece(transfer, None, transfer in copied, copied.get(transfer)) for transfer in local]

    def _copy(self, transfer: Transfer, sources: _Asked, target: Target) -> Digest | None:
        """Copy a box within the rank; as `_known` of it."""
        part = box_view(sources[transfer.source_name], transfer.source_box).to(WIRE_TYPES[transfer.kind])
        if self._verify:
            self._ledger.sent(transfer, part)
        view = box_view(target.buffer(transfer.target_name), transfer.target_box)
        view.copy_(part.reshape(view.shape))
        return self._known(part, view)

    def _known(self, part: torch.Tensor, view: torch.Tensor) -> Digest | None:
        """The digest of what came for a place whose type is another, and so its bits; None where the place's count."""
        return None if not self._verify or view.dtype == part.dtype else digest(part)

    def _in_place(self, message: Message, sources: _Asked, target: Target) -> torch.Tensor | None:
        """The bytes of a message's box on this rank, where they lie in one piece and in the type that travels."""
        transfer, *further = message.transfers
        if further or (not message.incoming and transfer.source_name in self._computed):
            return None
        if message.incoming:
            view = box_view(target.buffer(transfer.target_name), transfer.target_box)
        else:
            view = box_view(sources[transfer.source_name], transfer.source_box)
        as_it_travels = view.is_contiguous() and view.dtype == WIRE_TYPES[transfer.kind] and view.device == self.device
        return view.view(-1).view(torch.uint8) if as_it_travels else None

    def _post(self, operations: list[dist.P2POp], messages: Sequence[Message]) -> list[tuple[Any, Message]]:
        """Start the messages of a round, turn by turn; requests with a message of each."""
        # NCCL may order the messages of one call as it likes, and waits for all: a turn's, no more, must go in one.
        together = groupby(
            zip(operations, messages, strict=True),
            key=lambda pair: (pair[1].turn, pair[1].incoming and not self._one_wait_for_all),
        )
        requests: list[tuple[Any, Message]] = []
        for _, found in together:
            turn = list(found)
            try:
                made = dist.batch_isend_irecv([operation for operation, _ in turn])
            except RuntimeError as error:
                raise self._absence(turn[0][1], gone=not self._one_wait_for_all) from error
            requests.extend(zip(made, (message for _, message in turn), strict=False))
        return requests

    def _land(self, one: _Travelling, sources: _Asked, target: Target, left: dict[str, int]) -> None:
        """Copy a round's pieces to their places."""
        progress.tick()
        arrived = False
        for transfer, part, landed, known in one.pieces:
            if part is not None and not arrived:
                self._wait(one)
                arrived = True
            if part is None and not landed:
                known = self._copy(transfer, sources, target)
            view = box_view(target.buffer(transfer.target_name), transfer.target_box)
            if part is not None:
                if not landed:
                    view.copy_(part.reshape(view.shape))
                known = self._known(part, view)
            if self._verify:
                self._landed[transfer.target_name].append((transfer, view, known))
            left[transfer.target_name] -= 1
            if left[transfer.target_name] == 0:
                self._look_at(transfer.target_name)
                target.complete(transfer.target_name)
        if not arrived:
            self._wait(one)

    def _look_at(self, name: str) -> None:
        """Note what lies in a complete tensor, piece by piece: none may have been written over by another."""
        for transfer, view, known in self._landed.pop(name, ()):
            if known is None:
                known = digest(view)
                self.lying.setdefault(name, []).append((transfer.target_box, known))
            self._ledger.arrived(transfer, known)

    def _wait(self, one: _Travelling) -> None:
        """Until all messages of a round have left or come. Raises `PushError` naming the rank that fails to."""
        start = time.monotonic()
        for request, message in one.requests:
            left = self.time_limit - (time.monotonic() - start)
            try:
                # Torch cuts off what is less than a millisecond: a wait that ends early would pass for a broken
                # connection.
                request.wait(timedelta(milliseconds=max(1, math.ceil(left * 1000))))
            except RuntimeError as error:
                gone = time.monotonic() - start < self.time_limit and not self._one_wait_for_all
                raise self._absence(message, gone=gone) from error

    def _meet(self) -> None:
        """Until all ranks have all. Raises `PushError` naming those that do not come."""
        try:
            meet(self._run_name, self.time_limit)
        except RuntimeError as error:
            raise self._absence(None, gone=False) from error

    @property
    def _run_name(self) -> str:
        return f"move/{self._number}/{self._runs}"

    def _absence(self, message: Message | None, *, gone: bool) -> PushAbsence:
        """The error that names who is missing, after a wait failed: for `message`, or for the end of all others.

        `gone`: the connection to the message's peer broke.
        """
        gone, absent = find_absent(self._run_name, None if message is None else message.peer, gone=gone)
        who = f"rank{'s' if len(absent) > 1 else ''} {', '.join(map(str, absent))}" if absent else "a rank"
        silent = f"took no part for {self.time_limit:g} s (weights.time_limit)"
        what = f"{'are' if len(absent) > 1 else 'is'} gone" if gone else silent
        if message is None:
            where = f"rank {self.plan.rank} had done its part"
        else:
            way = "waited for {} from" if message.incoming else "had {} for"
            where = f"rank {self.plan.rank} {way.format(message.transfers[0].target_name)} rank {message.peer}"
        return PushAbsence(
            f"{self.occasion}: {who} {what}; {where}. The policy's weights are unharmed. Fix: look at the end of the "
            f"log of {who}, and start again from the last checkpoint"
        )


class _Buffer:
    """Memory for the messages of a round, one after another; kept for the next round."""

    def __init__(self, device: torch.device) -> None:
        self._flat = torch.empty(0, dtype=torch.uint8, device=device)
        self._taken = 0

    def hold(self, sizes: Sequence[int]) -> None:
        """Begin anew, with room for messages of so many bytes."""
        self._taken, needed = 0, sum(map(_aligned, sizes))
        if needed > self._flat.numel():
            # The old memory goes before the new comes.
            self._flat = self._flat.new_empty(0)
            self._flat = self._flat.new_empty(needed)

    def take(self, size: int) -> torch.Tensor:
        """The next message's bytes."""
        start = self._taken
        self._taken += _aligned(size)
        return self._flat[start : start + size]


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _write(part: torch.Tensor, sources: _Asked, transfer: Transfer) -> None:
    """Write what a transfer takes from a source, which nothing refers to afterwards."""
    view = box_view(sources[transfer.source_name], transfer.source_box)
    part.view(view.shape).copy_(view)


class _Leaving(NamedTuple):
    """A transfer to another rank and its bytes in a message; `in_place`: they are the source's own."""

    transfer: Transfer
    part: torch.Tensor
    in_place: bool


class _Piece(NamedTuple):
    """A transfer to this rank and the memory it arrives in; None: it is copied from the rank's own.

    `landed`: it lies in its place, `known` its digest where that is not the place's.
    """

    transfer: Transfer
    part: torch.Tensor | None
    landed: bool
    known: Digest | None = None


class _Asked:
    """A source's tensors; of those that are computed the last one is kept."""

    def __init__(self, source: WeightSource, computed: Mapping[str, str]) -> None:
        self._source, self._computed = source, computed
        self._last: tuple[str, torch.Tensor] | None = None

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._computed:
            return self._source[name]
        if self._last is None or self._last[0] != name:
            # The old tensor goes before the new one is made.
            self._last = None
            self._last = name, self._source[name]
        return self._last[1]

    def origin(self, name: str) -> str:
        """What a tensor is made of."""
        return self._computed.get(name, name)

    def begun_first(self, origins: Iterable[str]) -> list[str]:
        """The same, what was asked for last at the front."""
        begun = None if self._last is None else self.origin(self._last[0])
        return sorted(origins, key=lambda origin: origin != begun)


@dataclass(frozen=True, slots=True)
class _Travelling:
    """A round under way: what to wait for, and the pieces that are then written, in order."""

    requests: list[tuple[Any, Message]]
    pieces: list[_Piece]
