"""Micro-batches: training sequences laid out as the tensors of one forward pass.

Packed, sequences stand end to end in one row with their boundaries beside them; unpacked, each has a
row padded on the right to the longest of the micro-batch. Only rows that predict a response token
reach the output layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Sequences
from dataclasses import dataclass
from math import lcm

import numpy as np
import torch

from megarl.config.grid import padded_length, sequence_multiple
from megarl.parallel.context import held_positions
from megarl.records import Sequence


@dataclass(frozen=True, slots=True)
class Cut:
    """How the tokens of a micro-batch are cut over the ranks of a replica: `context` ranks share its sequences, and of
    the tokens of each of them `sequence_parallel` ranks hold a part between layers."""

    context: int = 1
    context_rank: int = 0
    sequence_parallel: int = 1

    def padded(self, length: int) -> int:
        """Tokens that a sequence takes in a packed row."""
        return padded_length(length, self.context)

    @property
    def width_multiple(self) -> int:
        """What the length of a row must be a multiple of."""
        return lcm(sequence_multiple(self.context), self.context * self.sequence_parallel)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One forward pass.

    tokens, positions int64 (B, S), B = 1 when packed, S the row's tokens on this context-parallel rank; boundaries
    int32 (N+1,): cumulative lengths of the whole sequences in the flat order of the rows before they are cut, padding
    included, at the end as a last sequence where there is any; padding bool (B, S): which tokens are.
    rows int64 (R,): flat indices b·S+s whose next token is a response token; targets int64 (R,): those tokens. parts:
    for every context-parallel rank, the places of its rows' tokens among all T response tokens of the micro-batch;
    T = R with one rank.
    sequence int64 (T,): index of the token's sequence; lengths float32 (N,): response tokens of each sequence.
    The per-token values are float32 (T,) or None where not known; NaN at targets, which have none but the reference's.
    routed int16 (B, S, sparse layers, k): the experts that the engine chose, -1 where not known; None: nowhere.
    target bool (N,), group int64 (N,) and signals float32 (N,) each, 0 at targets: those of the sequences.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    boundaries: torch.Tensor
    longest: int
    packed: bool
    padding: torch.Tensor
    rows: torch.Tensor
    targets: torch.Tensor
    parts: tuple[torch.Tensor, ...]
    sequence: torch.Tensor
    lengths: torch.Tensor
    advantages: torch.Tensor
    rollout_log_probs: torch.Tensor | None
    old_log_probs: torch.Tensor | None
    reference_log_probs: torch.Tensor | None
    target: torch.Tensor
    group: torch.Tensor
    signals: dict[str, torch.Tensor]
    routed: torch.Tensor | None
    real_tokens: int

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)

    @property
    def computed_tokens(self) -> int:
        """Tokens that this rank's forward pass computes, padding included."""
        return self.tokens.numel()


#: One rank computes all tokens.
_WHOLE = Cut()


def lay_out(
    sequences: Sequences[Sequence], *, packed: bool, cut: Cut = _WHOLE, device: torch.device | str = "cpu"
) -> MicroBatch:
    """Lay sequences out as one micro-batch, of which this rank gets the part that `cut` says.

    Without sequences it is padding alone.
    """
    multiple = cut.width_multiple
    lengths = [s.length for s in sequences]
    if packed:
        places = [cut.padded(length) for length in lengths]
        width = -(-max(sum(places), 1) // multiple) * multiple
        if width > sum(places):
            places.append(width - sum(places))
    else:
        width = -(-max(lengths, default=1) // multiple) * multiple
        places = [width] * max(len(lengths), 1)
    ends = np.cumsum(places)
    starts = ends - places
    tokens, positions = np.zeros(ends[-1], np.int64), np.concatenate([np.arange(place) for place in places])
    padding = np.ones(ends[-1], bool)
    for start, item in zip(starts, sequences, strict=False):
        tokens[start : start + item.length] = item.tokens
        padding[start : start + item.length] = False
    routed = _routed(sequences, starts, len(tokens))
    held = held_positions(places, cut.context, cut.context_rank)
    shape = (1 if packed else len(places), -1)
    responses = [s.response_length for s in sequences]
    predicting = _joined(
        np.arange(start + s.prompt_length - 1, start + s.length - 1)
        for start, s in zip(starts, sequences, strict=False)
    )
    targets = _joined(s.tokens[s.prompt_length :].astype(np.int64) for s in sequences)
    parts = [_local(predicting, held_positions(places, cut.context, rank), len(tokens)) for rank in range(cut.context)]
    mine, rows = parts[cut.context_rank]
    return MicroBatch(
        tokens=_tensor(tokens[held].reshape(shape), device),
        positions=_tensor(positions[held].reshape(shape), device),
        boundaries=torch.tensor([0, *ends], dtype=torch.int32).to(device),
        longest=max(places),
        packed=packed,
        padding=_tensor(padding[held].reshape(shape), device),
        rows=_tensor(rows, device),
        targets=_tensor(targets[mine], device),
        parts=tuple(_tensor(part, device) for part, _ in parts),
        sequence=_tensor(np.repeat(np.arange(len(sequences)), responses), device),
        lengths=torch.tensor(responses, dtype=torch.float32).to(device),
        advantages=_tensor(_joined(s.advantages for s in sequences).astype(np.float32), device),
        rollout_log_probs=_of_answers([s.rollout_log_probs for s in sequences], sequences, device),
        old_log_probs=_of_answers([s.old_log_probs for s in sequences], sequences, device),
        reference_log_probs=_values([s.reference_log_probs for s in sequences], device),
        target=torch.tensor([s.target for s in sequences]).to(device),
        group=torch.tensor([s.group for s in sequences]).to(device),
        signals={
            name: torch.tensor([s.signals.get(name, 0.0) for s in sequences], dtype=torch.float32).to(device)
            for name in dict.fromkeys(name for s in sequences for name in s.signals)
        },
        routed=None if routed is None else _tensor(routed[held].reshape(*shape, *routed.shape[1:]), device),
        real_tokens=sum(lengths),
    )


def _joined(parts: Iterable[np.ndarray]) -> np.ndarray:
    found = list(parts)
    return np.concatenate(found) if found else np.empty(0, np.int64)


def _local(wanted: np.ndarray, held: np.ndarray, total: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of the flat positions `wanted` are among `held`, and where in `held` those are."""
    place = np.full(total, -1)
    place[held] = np.arange(len(held))
    found = place[wanted]
    mine = np.flatnonzero(found >= 0)
    return mine, found[mine]


def _routed(sequences: Sequences[Sequence], starts: np.ndarray, total: int) -> np.ndarray | None:
    """The engine's experts of all tokens, (total, sparse layers, k) int16, -1 where not known."""
    known = [s.routed_experts.shape[1:] for s in sequences if s.routed_experts is not None]
    if not known:
        return None
    routed = np.full((total, *known[0]), -1, np.int16)
    for start, sequence in zip(starts, sequences, strict=False):
        if sequence.routed_experts is not None:
            routed[start : start + len(sequence.routed_experts)] = sequence.routed_experts
    return routed


def _tensor(array: np.ndarray, device: torch.device | str) -> torch.Tensor:
    return torch.from_numpy(array).to(device)


def _of_answers(
    parts: list[np.ndarray | None], sequences: Sequences[Sequence], device: torch.device | str
) -> torch.Tensor | None:
    """Values that targets do not have: NaN there, so that a term that forgets to leave them out shows it."""
    filled = [
        np.full(s.response_length, np.nan, np.float32) if s.target else part
        for part, s in zip(parts, sequences, strict=True)
    ]
    return _values(filled, device)


def _values(parts: Sequences[np.ndarray | None], device: torch.device | str) -> torch.Tensor | None:
    present = [p for p in parts if p is not None]
    if len(present) < len(parts):
        return None
    return _tensor(_joined(present).astype(np.float32), device)
