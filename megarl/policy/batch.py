"""Micro-batches: training sequences laid out as the tensors of one forward pass.

Packed, sequences stand end to end in one row with their boundaries beside them; unpacked, each has a
row padded on the right to the longest of the micro-batch. Only rows that predict a response token
reach the output layer.
"""

from __future__ import annotations

from collections.abc import Sequence as Sequences
from dataclasses import dataclass

import numpy as np
import torch

from megarl.records import Sequence


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One forward pass.

    tokens, positions int64 (B, S), B = 1 when packed; boundaries int32 (N+1,): cumulative lengths of the
    sequences in the flat order of `tokens`, padding included as a last sequence where there is any.
    rows int64 (R,): flat indices b·S+s whose next token is a response token; targets int64 (R,): those tokens;
    sequence int64 (R,): index of the row's sequence; lengths float32 (N,): response tokens of each sequence.
    The per-token values are float32 (R,) or None where not known; NaN at targets, which have none but the reference's.
    target bool (N,), group int64 (N,) and signals float32 (N,) each, 0 at targets: those of the sequences.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    boundaries: torch.Tensor
    longest: int
    packed: bool
    rows: torch.Tensor
    targets: torch.Tensor
    sequence: torch.Tensor
    lengths: torch.Tensor
    advantages: torch.Tensor
    rollout_log_probs: torch.Tensor | None
    old_log_probs: torch.Tensor | None
    reference_log_probs: torch.Tensor | None
    target: torch.Tensor
    group: torch.Tensor
    signals: dict[str, torch.Tensor]
    real_tokens: int

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)

    @property
    def computed_tokens(self) -> int:
        """Tokens the forward pass computes, padding included."""
        return self.tokens.numel()


def lay_out(
    sequences: Sequences[Sequence], *, packed: bool, length_multiple: int = 1, device: torch.device | str = "cpu"
) -> MicroBatch:
    """Lay sequences out as one micro-batch; the (padded) length is a multiple of `length_multiple`."""
    lengths = [s.length for s in sequences]
    offsets: list[int]
    if packed:
        total = sum(lengths)
        width = -(-total // length_multiple) * length_multiple
        tokens, positions = np.zeros((1, width), np.int64), np.zeros((1, width), np.int64)
        offsets = [0, *np.cumsum(lengths)[:-1].tolist()]
        boundaries = [0, *np.cumsum(lengths).tolist()]
        if width > total:
            boundaries.append(width)
            positions[0, total:] = np.arange(width - total)
        longest = max([*lengths, width - total])
    else:
        width = -(-max(lengths) // length_multiple) * length_multiple
        tokens = np.zeros((len(sequences), width), np.int64)
        positions = np.tile(np.arange(width), (len(sequences), 1))
        offsets = [i * width for i in range(len(sequences))]
        boundaries = [i * width for i in range(len(sequences) + 1)]
        longest = width
    flat_tokens, flat_positions = tokens.reshape(-1), positions.reshape(-1)
    for offset, item in zip(offsets, sequences, strict=True):
        flat_tokens[offset : offset + item.length] = item.tokens
        flat_positions[offset : offset + item.length] = np.arange(item.length)
    rows = [np.arange(o + s.prompt_length - 1, o + s.length - 1) for o, s in zip(offsets, sequences, strict=True)]
    responses = [s.response_length for s in sequences]
    return MicroBatch(
        tokens=_tensor(tokens, device),
        positions=_tensor(positions, device),
        boundaries=torch.tensor(boundaries, dtype=torch.int32).to(device),
        longest=longest,
        packed=packed,
        rows=_tensor(np.concatenate(rows), device),
        targets=_tensor(np.concatenate([s.tokens[s.prompt_length :].astype(np.int64) for s in sequences]), device),
        sequence=_tensor(np.repeat(np.arange(len(sequences)), responses), device),
        lengths=torch.tensor(responses, dtype=torch.float32).to(device),
        advantages=_tensor(np.concatenate([s.advantages for s in sequences]).astype(np.float32), device),
        rollout_log_probs=_of_answers([s.rollout_log_probs for s in sequences], sequences, device),
        old_log_probs=_of_answers([s.old_log_probs for s in sequences], sequences, device),
        reference_log_probs=_values([s.reference_log_probs for s in sequences], device),
        target=torch.tensor([s.target for s in sequences]).to(device),
        group=torch.tensor([s.group for s in sequences]).to(device),
        signals={
            name: torch.tensor([s.signals.get(name, 0.0) for s in sequences], dtype=torch.float32).to(device)
            for name in dict.fromkeys(name for s in sequences for name in s.signals)
        },
        real_tokens=sum(lengths),
    )


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
    return _tensor(np.concatenate(present).astype(np.float32), device)
