"""Micro-batches: training sequences laid out as the tensors of one forward pass.

Packed, sequences stand end to end in one row with their boundaries beside them; unpacked, each has a
row padded on the right to the longest of the micro-batch. Only rows that predict a trained token
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
    the tokens of each of them `sequence_parallel` ranks hold a part between layers. A rank's tokens of a row are a
    multiple of `token_multiple`."""

    context: int = 1
    context_rank: int = 0
    sequence_parallel: int = 1
    token_multiple: int = 1

    def padded(self, length: int) -> int:
        """Tokens that a sequence takes in a packed row."""
        return padded_length(length, self.context)

    @property
    def width_multiple(self) -> int:
        """What the length of a row must be a multiple of."""
        return lcm(sequence_multiple(self.context), self.context * self.sequence_parallel * self.token_multiple)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One forward pass.

    tokens, positions int64 (B, S), B = 1 when packed, S the row's tokens on this context-parallel rank; boundaries
    int32 (N+1,): cumulative lengths of the whole sequences in the flat order of the rows before they are cut, padding
    included, at the end as a last sequence where there is any; padding bool (B, S): which tokens are.
    rows int64 (R,): flat indices b·S+s whose next token is a trained one; targets int64 (R,): those tokens.
    temperature: that of the log-probs, float64 (R,) where it differs between sequences. parts: for every
    context-parallel rank, the places of its rows' tokens among all T trained tokens of the micro-batch; T = R with one.
    sequence int64 (T,): index of the token's sequence; lengths float32 (N,): trained tokens of each sequence, as
    `trained` says them on the host.
    The per-token values are float32 (T,), NaN at sequences without them, None where all are.
    routed int16 (B, S, sparse layers, k): the experts that the engine chose, -1 where not known; None: nowhere.
    kinds (N), group int64 (N,) and signals float32 (N,) each, 0 at sequences without them: those of the sequences.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    boundaries: torch.Tensor
    longest: int
    packed: bool
    padding: torch.Tensor
    rows: torch.Tensor
    targets: torch.Tensor
    temperature: float | torch.Tensor
    parts: tuple[torch.Tensor, ...]
    sequence: torch.Tensor
    lengths: torch.Tensor
    trained: tuple[int, ...]
    advantages: torch.Tensor | None
    rollout_log_probs: torch.Tensor | None
    old_log_probs: torch.Tensor | None
    log_probs_under: dict[str, torch.Tensor]
    kinds: tuple[str, ...]
    group: torch.Tensor
    signals: dict[str, torch.Tensor]
    routed: torch.Tensor | None
    real_tokens: int

    @property
    def num_sequences(self) -> int:
        return len(self.trained)

    @property
    def computed_tokens(self) -> int:
        """Tokens that this rank's forward pass computes, padding included."""
        return self.tokens.numel()


#: One rank computes all tokens.
_WHOLE = Cut()


def lay_out(
    sequences: Sequences[Sequence],
    *,
    packed: bool,
    cut: Cut = _WHOLE,
    device: torch.device | str = "cpu",
    least: int = 0,
) -> MicroBatch:
    """Lay sequences out as one micro-batch, of which this rank gets the part that `cut` says.

    A packed row is padded to `least` tokens where it has fewer. Without sequences it is padding alone.
    """
    places = _places([s.length for s in sequences], packed, cut, least)
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
    trained = [s.trained for s in sequences]
    predicting = _joined(start + s.positions.astype(np.int64) - 1 for start, s in zip(starts, sequences, strict=False))
    targets = _joined(s.tokens[s.positions].astype(np.int64) for s in sequences)
    parts = [_local(predicting, held_positions(places, cut.context, rank), len(tokens)) for rank in range(cut.context)]
    mine, rows = parts[cut.context_rank]
    under = dict.fromkeys(name for s in sequences for name in s.log_probs_under)
    return MicroBatch(
        tokens=_tensor(tokens[held].reshape(shape), device),
        positions=_tensor(positions[held].reshape(shape), device),
        boundaries=torch.tensor([0, *ends], dtype=torch.int32).to(device),
        longest=max(places),
        packed=packed,
        padding=_tensor(padding[held].reshape(shape), device),
        rows=_tensor(rows, device),
        targets=_tensor(targets[mine], device),
        temperature=_temperature(sequences, mine, device),
        parts=tuple(_tensor(part, device) for part, _ in parts),
        sequence=_tensor(np.repeat(np.arange(len(sequences)), trained), device),
        lengths=torch.tensor(trained, dtype=torch.float32).to(device),
        trained=tuple(trained),
        advantages=_values([s.advantages for s in sequences], trained, device),
        rollout_log_probs=_values([s.rollout_log_probs for s in sequences], trained, device),
        old_log_probs=_values([s.old_log_probs for s in sequences], trained, device),
        log_probs_under={
            name: values
            for name in under
            if (values := _values([s.log_probs_under.get(name) for s in sequences], trained, device)) is not None
        },
        kinds=tuple(s.kind for s in sequences),
        group=torch.tensor([s.group for s in sequences]).to(device),
        signals={
            name: torch.tensor([s.signals.get(name, 0.0) for s in sequences], dtype=torch.float32).to(device)
            for name in dict.fromkeys(name for s in sequences for name in s.signals)
        },
        routed=None if routed is None else _tensor(routed[held].reshape(*shape, *routed.shape[1:]), device),
        real_tokens=sum(s.length for s in sequences),
    )


def apart(values: Sequences[torch.Tensor], trained: Iterable[int]) -> list[np.ndarray]:
    """Values (T,) of micro-batches as those of each of their sequences, float32, in their order.

    All in one transfer: a GPU is waited for once.
    """
    if not values:
        return []
    whole = torch.cat([one.detach().float() for one in values]).cpu()
    return [part.numpy() for part in whole.split(list(trained))]


def _places(lengths: list[int], packed: bool, cut: Cut, least: int) -> list[int]:
    """Tokens that each sequence takes, padding included; what pads a packed row as a last one."""
    multiple = cut.width_multiple
    if not packed:
        width = -(-max(lengths, default=1) // multiple) * multiple
        return [width] * max(len(lengths), 1)
    places = [cut.padded(length) for length in lengths]
    width = -(-max(sum(places), least, 1) // multiple) * multiple
    return [*places, width - sum(places)] if width > sum(places) else places


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


def _temperature(sequences: Sequences[Sequence], mine: np.ndarray, device: torch.device | str) -> float | torch.Tensor:
    """The temperature of this rank's rows; one number where all sequences have the same."""
    found = [s.temperature for s in sequences]
    if len(set(found)) <= 1:
        return found[0] if found else 1.0
    return _tensor(np.repeat(np.array(found, np.float64), [s.trained for s in sequences])[mine], device)


def _tensor(array: np.ndarray, device: torch.device | str) -> torch.Tensor:
    return torch.from_numpy(array).to(device)


def _values(parts: Sequences[np.ndarray | None], trained: list[int], device: torch.device | str) -> torch.Tensor | None:
    """NaN where a sequence has none, so that a loss that forgets to leave its tokens out shows it."""
    if all(part is None for part in parts):
        return None
    filled = [
        np.full(count, np.nan, np.float32) if part is None else part for part, count in zip(parts, trained, strict=True)
    ]
    return _tensor(_joined(filled).astype(np.float32), device)
