"""The reshard plan of one rank: which box of whose tensor goes into which box of whose tensor, and when.

It follows from the layouts alone; no communication, no tensors, and no other rank's plan. What a rank holds itself it
copies; what it lacks it receives once, from the nearest holder, and holders that are equally near share the sending
evenly. Nothing whole is ever gathered.

Layers come in order, but not all ranks begin with the same one: each begins with its own lane, a pipeline stage, and
goes on with the next, so that at any time each stage sends to one other and none waits for its turn to send.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megarl.reshard.boxes import Box, extents, narrow, numel, overlap
from megarl.reshard.dealing import Turn
from megarl.reshard.layout import Layout
from megarl.reshard.matching import Cell, Matched, PlanError, match
from megarl.reshard.wire import BYTES, Kind, Wire

#: Messages are at most this part of a bucket, so that buckets fill well.
MESSAGES_PER_BUCKET = 4

#: Boxes of at least that many bytes travel alone: they may need no copy at either end.
ALONE = 1 << 19


class Transfer(NamedTuple):
    """One box copied from a tensor of rank `source` to a tensor of rank `target`, travelling as `kind`.

    Both boxes have the same extents, leading dimensions of extent 1 aside.
    """

    source: int
    target: int
    source_name: str
    source_box: Box
    target_name: str
    target_box: Box
    kind: Kind

    @property
    def numel(self) -> int:
        """Elements copied."""
        return numel(self.target_box)

    @property
    def nbytes(self) -> int:
        """Bytes that travel."""
        return self.numel * BYTES[self.kind]


class Message(NamedTuple):
    """Boxes that travel together between a rank and its `peer`, in one piece of `nbytes` bytes.

    In it each box begins at a multiple of its element's size: between boxes of different types there may be a gap.
    `turn`: its place in the order that all ranks have in common. In a turn a rank sends at most one message, and
    receives at most one.
    """

    turn: tuple[int, ...]
    peer: int
    incoming: bool
    transfers: tuple[Transfer, ...]
    nbytes: int

    def spans(self) -> Iterator[tuple[Transfer, int, int]]:
        """Each box with its bytes [start, stop) in the message."""
        stop = 0
        for transfer in self.transfers:
            start = _aligned(stop, transfer)
            stop = start + transfer.nbytes
            yield transfer, start, stop


@dataclass(frozen=True, slots=True)
class Round:
    """Messages that are under way together, and the copies within the rank that are due with them."""

    messages: tuple[Message, ...]
    local: tuple[Transfer, ...]

    @property
    def nbytes(self) -> int:
        """Bytes sent and received."""
        return sum(message.nbytes for message in self.messages)

    def arriving(self) -> Iterator[Transfer]:
        """What comes from other ranks."""
        return (transfer for message in self.messages if message.incoming for transfer in message.transfers)


@dataclass(frozen=True)
class Plan:
    """The rounds of one rank, in order.

    All ranks have their messages in one order, which rounds do not break; where a round ends is each rank's own. If
    every rank starts its turns one after another, and a round before it waits for the one before, all messages arrive:
    of those that are not through, the one whose turn is first has been started by both of its ranks.
    """

    rank: int
    rounds: tuple[Round, ...]

    def local(self) -> list[Transfer]:
        """Copies within the rank."""
        return [transfer for one in self.rounds for transfer in one.local]

    def receives(self) -> list[Transfer]:
        """What the rank receives from others."""
        return [transfer for one in self.rounds for transfer in one.arriving()]

    def sends(self) -> list[Transfer]:
        """What the rank sends to others."""
        return [t for one in self.rounds for message in one.messages if not message.incoming for t in message.transfers]

    def lines(self) -> Iterator[str]:
        """The schedule as text: a line for every box, with its round, the other rank, both places, and its bytes."""
        for number, one in enumerate(self.rounds):
            for transfer in one.local:
                yield f"round {number} copy {_line(transfer)}"
            for message in one.messages:
                way = "from" if message.incoming else "to"
                yield from (f"round {number} {way} {message.peer} {_line(transfer)}" for transfer in message.transfers)


def _line(transfer: Transfer) -> str:
    places = ((transfer.source_name, transfer.source_box), (transfer.target_name, transfer.target_box))
    source, target = (f"{name}[{', '.join(f'{a}:{b}' for a, b in box)}]" for name, box in places)
    return f"{source} -> {target} {transfer.nbytes}"


def make_plan(
    rank: int,
    sources: Layout,
    targets: Layout,
    *,
    node_of_rank: Sequence[int],
    lane_of_rank: Sequence[int],
    bucket_bytes: int,
    wire: Wire,
) -> Plan:
    """Plan a rank's part in filling every target tensor from the source tensors.

    `node_of_rank` says which ranks share a node, `lane_of_rank` which hold the same layers (numbers from 0), `wire` in
    which type a tensor travels. A round sends and receives at most `bucket_bytes` together, or one element where that
    is more; larger boxes are cut.

    Raises `PlanError` where the sources do not cover a target and where two boxes would be written to one place of the
    rank's own tensors, `ValueError` unless `bucket_bytes` ≥ 1.
    """
    if bucket_bytes < 1:
        raise ValueError(f"bucket_bytes={bucket_bytes}: must be at least 1")
    limit = max(1, bucket_bytes // MESSAGES_PER_BUCKET)
    steps = _steps(sources, targets, lane_of_rank, limit, wire)
    lanes = max(lane_of_rank, default=0) + 1
    streams: dict[_Stream, list[Transfer]] = defaultdict(list)
    local: dict[tuple[int, int], list[Transfer]] = defaultdict(list)
    for one in match(sources, targets, node_of_rank):
        lane, step = steps[one.name]
        for transfer in _transfers(rank, one, wire(one.name)):
            due = (lane - lane_of_rank[transfer.target]) % lanes, step
            if transfer.source == transfer.target:
                local[due].append(transfer)
            else:
                streams[_Stream(*due, transfer.source, transfer.target)].extend(_slabs(transfer, limit))
    rounds = _rounds(rank, _ordered(streams, len(node_of_rank), limit), local, bucket_bytes)
    plan = Plan(rank, tuple(rounds))
    _check_written_once(plan)
    return plan


class _Stream(NamedTuple):
    """What goes from one rank to another in a step of a phase: when the target takes tensors of a further lane."""

    phase: int
    step: int
    source: int
    target: int


def _steps(
    sources: Layout, targets: Layout, lane_of_rank: Sequence[int], limit: int, wire: Wire
) -> dict[str, tuple[int, int]]:
    """The lane of every tensor, and its step there: consecutive tensors of which no rank needs more than `limit` bytes.

    The sum of what each tensor's neediest ranks need stands for what one rank needs, and may be more than that.
    """
    steps: dict[str, tuple[int, int]] = {}
    ends: dict[int, tuple[int, int]] = {}
    for name in sources:
        if name in targets:
            lane = lane_of_rank[sources[name][0].split.places[0].ranks[0]]
            size = sum(spread.split.most_elements for spread in targets[name]) * BYTES[wire(name)]
            step, taken = ends.get(lane, (0, 0))
            if taken and taken + size > limit:
                step, taken = step + 1, 0
            steps[name] = lane, step
            ends[lane] = step, taken + size
    return steps


def _transfers(rank: int, one: Matched, kind: Kind) -> Iterator[Transfer]:
    """What a rank copies, receives and sends of one tensor; for every pair of ranks in the same order on both."""
    sources, target = one.sources, one.target
    for cell, deal in one.match.received_by(rank):
        if deal is None:
            origin, box = cell.origins[rank]
            held = sources[origin]
            yield Transfer(rank, rank, held.tensor, held.box(box), target.tensor, target.box(cell.box), kind)
            continue
        for turn in deal.received(one.number, rank):
            yield _dealt(one, cell, turn, kind)
    for cell, deal in one.match.sent_by(rank):
        for turn in deal.sent(one.number, rank):
            yield _dealt(one, cell, turn, kind)


def _dealt(one: Matched, cell: Cell, turn: Turn, kind: Kind) -> Transfer:
    """What is sent in a turn: a cell, or a part of it along its longest dimension."""
    origin, source_box = cell.origins[turn.holder]
    held, target_box = one.sources[origin], cell.box
    if turn.parts > 1:
        lengths = extents(target_box)
        axis = lengths.index(max(lengths))
        span = turn.span(lengths[axis])
        source_box, target_box = narrow(source_box, axis, *span), narrow(target_box, axis, *span)
    target = one.target
    return Transfer(
        turn.holder, turn.needer, held.tensor, held.box(source_box), target.tensor, target.box(target_box), kind
    )


def _slabs(transfer: Transfer, most: int) -> list[Transfer]:
    """Cut a transfer into slabs of at most `most` bytes, or one element, along its first dimension that is not 1."""
    if transfer.nbytes <= most or transfer.numel == 1:
        return [transfer]
    box = transfer.target_box
    axis = next(axis for axis in range(-len(box), 0) if box[axis][1] - box[axis][0] > 1)
    length = box[axis][1] - box[axis][0]
    step = max(1, most * length // transfer.nbytes)
    slabs: list[Transfer] = []
    for start in range(0, length, step):
        stop = min(start + step, length)
        slab = transfer._replace(
            source_box=narrow(transfer.source_box, axis, start, stop), target_box=narrow(box, axis, start, stop)
        )
        # A single row can still be too long: it is cut along the next dimension.
        slabs.extend(_slabs(slab, most))
    return slabs


def _ordered(
    streams: Mapping[_Stream, list[Transfer]], world: int, limit: int
) -> list[tuple[tuple[int, ...], _Stream, tuple[Transfer, ...], int]]:
    """The streams cut into messages of at most `limit` bytes, with their turns, in the order that all ranks share.

    In each step a rank sends to the next one while it receives from the one before, then the next but one, and so on.
    """
    found: list[tuple[tuple[int, ...], _Stream, tuple[Transfer, ...], int]] = []
    for stream, transfers in streams.items():
        message: list[Transfer] = []
        size = number = 0
        for transfer in transfers:
            end = _aligned(size, transfer) + transfer.nbytes
            if message and (end > limit or max(transfer.nbytes, message[0].nbytes) >= ALONE):
                found.append((_turn(stream, number, world), stream, tuple(message), size))
                message, end, number = [], transfer.nbytes, number + 1
            message.append(transfer)
            size = end
        found.append((_turn(stream, number, world), stream, tuple(message), size))
    # Of the two messages that a rank has in a turn, the one to the lower rank is first: if they fall into two rounds,
    # all messages are still in one order.
    found.sort(key=lambda one: (one[0], one[1].target))
    return found


def _aligned(offset: int, transfer: Transfer) -> int:
    """The first byte from `offset` on at which the transfer's elements can be read."""
    element = BYTES[transfer.kind]
    return -(-offset // element) * element


def _turn(stream: _Stream, number: int, world: int) -> tuple[int, ...]:
    return stream.phase, stream.step, number, (stream.target - stream.source) % world


def _rounds(
    rank: int,
    messages: Sequence[tuple[tuple[int, ...], _Stream, tuple[Transfer, ...], int]],
    local: Mapping[tuple[int, int], list[Transfer]],
    bucket_bytes: int,
) -> Iterator[Round]:
    """Messages in rounds, each as full as the bound allows; copies in the round of their step, or the one before."""
    waiting = sorted(local)
    group: list[Message] = []
    copies: list[Transfer] = []
    size = 0
    for turn, stream, transfers, nbytes in messages:
        if group and size + nbytes > bucket_bytes:
            yield Round(tuple(group), tuple(copies))
            group, copies, size = [], [], 0
        while waiting and waiting[0] <= stream[:2]:
            copies.extend(local[waiting.pop(0)])
        incoming = stream.target == rank
        group.append(Message(turn, stream.source if incoming else stream.target, incoming, transfers, nbytes))
        size += nbytes
    copies.extend(transfer for due in waiting for transfer in local[due])
    if group or copies:
        yield Round(tuple(group), tuple(copies))


def _check_written_once(plan: Plan) -> None:
    written: dict[str, list[Box]] = defaultdict(list)
    for transfer in (*plan.local(), *plan.receives()):
        written[transfer.target_name].append(transfer.target_box)
    for name, boxes in written.items():
        twice = overlap(boxes)
        if twice:
            raise PlanError(f"{name} on rank {plan.rank}: boxes {twice[0]} and {twice[1]} would both be written")
