"""How much the later steps of a sequence look at each of its steps, from the layers' queries and keys.

AttnRL's forward context influence (arXiv 2509.26628): of every layer and head the attention of a step's tokens to
another's, in the mean over both, summed over the steps that come `distance` or more behind; then the maximum over
heads and layers. The softmax is made again, in fp32, for a block of queries at a time, and added up at once to what
every key is worth: nothing is kept that is a sequence long and wide, however many its steps.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megarl.config.grid import Chunk, Grid
from megarl.config.influence import InfluenceSettings
from megarl.parallel.context import held_positions
from megarl.parallel.cpu_platform import has_cuda
from megarl.policy.batch import MicroBatch


@dataclass(frozen=True, slots=True)
class _Row:
    """One sequence of a micro-batch, of `length` tokens from `start` on among those of the whole micro-batch.

    Of this rank's queries the Q that count, in order: `own` int64 (Q,) their places among this rank's tokens, `places`
    (Q,) in the sequence; `reach` (Q,): how many keys, from the first on, are of steps far enough before; `weights`
    float32 (Q,): one over the tokens of the query's step. sizes float32 (S,): tokens of each step; `offset`: where the
    steps begin among those of the whole pass.
    """

    start: int
    length: int
    own: np.ndarray
    places: np.ndarray
    reach: np.ndarray
    weights: np.ndarray
    sizes: np.ndarray
    offset: int


class InfluenceTap:
    """Listens to the layers of a pass without gradient.

    `starts`: of each sequence of the pass, of `lengths` tokens, where its steps begin, from 0 on, the prompt being the
    first; `scale`: what logits are multiplied by; `num_heads`: query heads of a layer, on all ranks together. Raises
    `ValueError` for starts that are none of a sequence's.
    """

    def __init__(
        self,
        settings: InfluenceSettings,
        starts: Sequence[np.ndarray],
        lengths: Sequence[int],
        grid: Grid,
        num_heads: int,
        scale: float,
        device: torch.device | str = "cpu",
    ) -> None:
        for own, length in zip(starts, lengths, strict=True):
            if not len(own) or own[0] != 0 or (np.diff(own) < 1).any() or own[-1] >= length:
                raise ValueError(f"steps of a sequence of {length} tokens must begin at 0 and ascend: {own}")
        self._settings, self._grid, self._scale, self._device = settings, grid, scale, device
        self._starts, self._lengths = starts, lengths
        self._offsets = np.cumsum([0, *(len(own) for own in starts)])
        self._found = torch.zeros(int(self._offsets[-1]), device=device)
        local = num_heads // grid.tensor
        mine = range(grid.tensor_rank * local, (grid.tensor_rank + 1) * local)
        # Of this rank's heads; None: all of them.
        self._heads: torch.Tensor | None = None
        if settings.heads is not None and not set(mine) <= set(settings.heads):
            chosen = sorted(set(settings.heads) & set(mine))
            self._heads = torch.tensor([head - mine.start for head in chosen], dtype=torch.int64, device=device)
        self._now: tuple[MicroBatch, list[int]] | None = None
        #: Spent in listening; on a GPU in queueing its work.
        self.seconds = 0.0
        # By the micro-batch's first sequence: the chunks of a stage see micro-batches in turns.
        self._rows: dict[int, list[_Row]] = {}

    def now(self, batch: MicroBatch, members: list[int]) -> None:
        """The micro-batch that layers see from here on, and its sequences' positions in the pass."""
        self._now = batch, members

    @contextmanager
    def listening(self, modules: Sequence[Any], chunks: Sequence[Chunk]) -> Iterator[None]:
        """Hear the attention of these model chunks inside, whose layers are those of `chunks`."""
        wanted = self._settings.layers
        layers = [
            layer
            for module, chunk in zip(modules, chunks, strict=True)
            for number, layer in zip(chunk.layers, module.decoder.layers, strict=True)
            if wanted is None or number in wanted
        ]
        if self._heads is not None and not len(self._heads):
            # All ranks of a context-parallel group have the same heads and layers: none waits for another.
            layers = []
        handles = [
            layer.self_attention.core_attention.register_forward_pre_hook(self._hear, with_kwargs=True)
            for layer in layers
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def gather(self) -> list[np.ndarray]:
        """The influences float32 (S,) of each sequence's steps over all layers and heads, on all ranks of the replica.
        Collective."""
        if not self._starts:
            return []
        for size, group in (
            (self._grid.tensor, parallel_state.get_tensor_model_parallel_group),
            (self._grid.pipeline, parallel_state.get_pipeline_model_parallel_group),
        ):
            if size > 1:
                dist.all_reduce(self._found, op=dist.ReduceOp.MAX, group=group())
        return np.split(self._found.cpu().numpy(), self._offsets[1:-1])

    def _hear(self, module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        assert self._now is not None
        batch, members = self._now
        if not members:
            return
        began = time.perf_counter()
        self._listen(batch, members, arguments[0], arguments[1], keywords.get("packed_seq_params"))
        self.seconds += time.perf_counter() - began

    def _listen(
        self, batch: MicroBatch, members: list[int], query: torch.Tensor, key: torch.Tensor, packing: Any
    ) -> None:
        """Take up what a layer attends to. Collective over the context-parallel group."""
        if members[0] not in self._rows:
            self._rows[members[0]] = self._rows_of(batch, members)
        rows = self._rows[members[0]]
        query, key = _rotated(query, key, packing)
        key = self._whole(key, batch)
        # A sum over the ranks that share the queries, and only then a maximum over heads.
        sums = torch.cat([self._sums(query, key, row) for row in rows], dim=1)
        if self._grid.context > 1:
            dist.all_reduce(sums, group=parallel_state.get_context_parallel_group())
        for row, one in zip(rows, sums.split([len(row.sizes) for row in rows], dim=1), strict=True):
            found = self._found[row.offset : row.offset + len(row.sizes)]
            torch.maximum(found, (one / torch.from_numpy(row.sizes).to(one.device)).amax(0), out=found)

    def _rows_of(self, batch: MicroBatch, members: list[int]) -> list[_Row]:
        lengths, context, distance = batch.boundaries.diff().tolist(), self._grid.context, self._settings.distance
        held = held_positions(lengths, context, self._grid.context_rank)
        ends, rows = np.cumsum(lengths), []
        for member, end, padded in zip(members, ends, lengths, strict=False):
            starts, length, start = self._starts[member], self._lengths[member], int(end) - padded
            sizes = np.diff(starts, append=length)
            # What comes before step `distance` has no step that far before it.
            first = start + starts[distance] if len(starts) > distance else end
            own = np.flatnonzero((held >= first) & (held < start + length))
            places = held[own] - start
            step = np.searchsorted(starts, places, side="right") - 1
            reach = starts[np.maximum(step - distance + 1, 0)]
            weights = (1.0 / sizes[step]).astype(np.float32)
            offset = int(self._offsets[member])
            rows.append(_Row(start, length, own, places, reach, weights, sizes.astype(np.float32), offset))
        return rows

    def _whole(self, key: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
        """The keys of all tokens of a micro-batch, in order. Collective over the context-parallel group."""
        context = self._grid.context
        if context == 1:
            return key
        lengths = batch.boundaries.diff().tolist()
        held = np.concatenate([held_positions(lengths, context, rank) for rank in range(context)])
        parts = [torch.empty_like(key) for _ in range(context)]
        group: Any = parallel_state.get_context_parallel_group()
        dist.all_gather(parts, key.contiguous(), group=group)
        return torch.cat(parts)[torch.from_numpy(np.argsort(held)).to(key.device)]

    def _sums(self, query: torch.Tensor, key: torch.Tensor, row: _Row) -> torch.Tensor:
        """What this rank's queries (tokens, heads, D) look at the steps of a sequence, (chosen heads, S) fp32: weights
        on a step's keys (tokens of all ranks, kv heads, D) are added up, and those of a step's queries averaged."""
        group = query.shape[1] // key.shape[1]
        keys = key[row.start : row.start + row.length].transpose(0, 1)
        if self._heads is not None:
            # Chosen heads need not be equally many of each key's.
            keys, group = keys[self._heads // group], 1
        keys = keys.float()
        worth = keys.new_zeros(len(keys) * group, row.length)
        columns = torch.arange(row.length, device=keys.device)
        on_device = [torch.from_numpy(one).to(keys.device) for one in (row.own, row.places, row.reach, row.weights)]
        for first in range(0, len(row.own), self._settings.query_block):
            part = slice(first, first + self._settings.query_block)
            own, places, reach, weights = (one[part] for one in on_device)
            queries = query[own] if self._heads is None else query[own][:, self._heads]
            # (kv heads, queries of their heads end to end, D)
            queries = queries.float().unflatten(1, (len(keys), group)).permute(1, 2, 0, 3).flatten(1, 2)
            queries = queries * self._scale
            last, near, far = int(row.places[part][-1]) + 1, int(row.reach[part][0]), int(row.reach[part][-1])
            seen = (queries @ keys[:, :last].mT).view(len(worth), -1, last)
            # All of them may look at the keys up to the first one's, and all count at those before `near`.
            until = int(row.places[first]) + 1
            seen[..., until:].masked_fill_(columns[until:last] > places[:, None], -torch.inf)
            seen = seen.softmax(-1)[..., :far]
            seen[..., near:].masked_fill_(columns[near:far] >= reach[:, None], 0.0)
            worth[:, :far] += torch.bmm(weights.expand(len(worth), 1, -1), seen).squeeze(1)
            del seen
        sizes = torch.from_numpy(row.sizes).to(keys.device).long()
        # Steps lie end to end; unlike an addition by index this one's order is always the same.
        return torch.segment_reduce(worth.T.contiguous(), "sum", lengths=sizes, unsafe=True).T


def _rotated(query: torch.Tensor, key: torch.Tensor, packing: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys with rotary embedding, (tokens of all rows end to end, heads, D) each.

    Here alone is known that Transformer Engine is given rotated ones and the CPU's attention plain ones; that packed
    tokens come without a dimension for the batch there, and with one here.
    """
    if not has_cuda():
        from megarl.policy.cpu_attention import rotate

        query, key = (rotate(one, packing.cos, packing.sin) for one in (query, key))
    if query.dim() == 4:
        query, key = (one.transpose(0, 1).flatten(0, 1) for one in (query, key))
    return query, key
