"""How much the later steps of a sequence look at each of its steps, from the layers' queries and keys.

AttnRL's forward context influence (arXiv 2509.26628): of every layer and head the attention of a step's tokens to
another's, in the mean over both, summed over the steps that come `distance` or more behind; then the maximum over
heads and layers. The softmax is made again, in fp32, for a block of queries at a time, and reduced to steps at once:
nothing is kept that is a sequence long and wide.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megarl.parallel.context import held_positions
from megarl.parallel.cpu_platform import has_cuda
from megarl.policy.batch import Cut, MicroBatch


class _Row(NamedTuple):
    """One sequence in a layer: this rank's queries (heads, Q, D) at `places` (Q,), and all keys (kv heads, L, D)."""

    queries: torch.Tensor
    places: torch.Tensor
    keys: torch.Tensor


class InfluenceTap:
    """Listens to the layers of a pass without gradient.

    `starts`: of each sequence of the pass, of `lengths` tokens, where its steps begin, from 0 on, the prompt being the
    first; `scale`: what logits are multiplied by; `block`: queries at a time. `found` are the influences (S,) of each
    sequence's steps, over this rank's layers and heads.
    """

    def __init__(
        self,
        starts: Sequence[np.ndarray],
        lengths: Sequence[int],
        cut: Cut,
        scale: float,
        *,
        distance: int = 4,
        block: int = 64,
    ) -> None:
        self._starts, self._lengths, self._cut, self._scale = starts, lengths, cut, scale
        self._distance, self._block = distance, block
        self.found = [np.zeros(len(own), np.float32) for own in starts]
        self._batch: MicroBatch | None = None
        self._members: list[int] = []

    def now(self, batch: MicroBatch, members: list[int]) -> None:
        """The micro-batch that layers see from here on, and its sequences' positions in the pass."""
        self._batch, self._members = batch, members

    @contextmanager
    def listening(self, chunks: Sequence[Any]) -> Iterator[None]:
        """Hear the attention of these model chunks inside."""
        handles = [
            layer.self_attention.core_attention.register_forward_pre_hook(self._hear, with_kwargs=True)
            for chunk in chunks
            for layer in chunk.decoder.layers
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hear(self, module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        query, key, *_ = arguments
        assert self._batch is not None
        packing = keywords.get("packed_seq_params")
        for member, row in zip(self._members, _rows(query, key, packing, self._batch, self._cut), strict=False):
            found = self._of_layer(row, self._starts[member], self._lengths[member])
            self.found[member] = np.maximum(self.found[member], found)

    def _of_layer(self, row: _Row, starts: np.ndarray, length: int) -> np.ndarray:
        """The greatest influence (S,) over this rank's heads; what pads the sequence is left out."""
        heads, real = len(row.queries), row.places < length
        queries_of, places_of = row.queries[:, real], row.places[real]
        ends = np.append(starts[1:], length)
        step_of = torch.from_numpy(np.repeat(np.arange(len(starts)), ends - starts)).to(row.keys.device)
        sizes = torch.from_numpy((ends - starts).astype(np.float32)).to(row.keys.device)
        keys = row.keys[:, :length].float().repeat_interleave(heads // len(row.keys), dim=0)
        sums = keys.new_zeros(heads, len(starts), len(starts))
        places = torch.arange(length, device=keys.device)
        for first in range(0, len(places_of), self._block):
            queries = queries_of[:, first : first + self._block].float()
            at = places_of[first : first + self._block]
            logits = queries @ keys.mT * self._scale
            weights = logits.masked_fill(places > at[:, None], -torch.inf).softmax(-1)
            by_step = weights.new_zeros(heads, len(at), len(starts)).index_add_(2, step_of, weights)
            sums.index_add_(1, step_of[at], by_step)
        if self._cut.context > 1:
            dist.all_reduce(sums, group=parallel_state.get_context_parallel_group())
        means = sums / (sizes[:, None] * sizes)
        behind = torch.ones(len(starts), len(starts), device=keys.device).tril(-self._distance)
        return (means * behind).sum(1).amax(0).cpu().numpy()

    def gather(self, device: torch.device) -> list[np.ndarray]:
        """The influences over all layers and heads, on all ranks of the replica. Collective."""
        if not self.found:
            return []
        flat = torch.from_numpy(np.concatenate(self.found)).to(device)
        for group in (
            parallel_state.get_tensor_model_parallel_group(),
            parallel_state.get_pipeline_model_parallel_group(),
        ):
            dist.all_reduce(flat, op=dist.ReduceOp.MAX, group=group)
        ends = np.cumsum([len(own) for own in self.found])
        return np.split(flat.cpu().numpy(), ends[:-1])


def _rows(query: torch.Tensor, key: torch.Tensor, packing: Any, batch: MicroBatch, cut: Cut) -> Iterator[_Row]:
    """The sequences of a micro-batch, with rotary embedding. Collective over the context-parallel group.

    Here alone is known that Transformer Engine is given rotated queries and keys, and the CPU's attention plain ones;
    that packed tokens come without a dimension for the batch there, and with one here.
    """
    if not has_cuda():
        from megarl.policy.cpu_attention import rotate

        query, key = (rotate(one, packing.cos, packing.sin) for one in (query, key))
    # (tokens of all rows end to end, heads, D)
    if query.dim() == 4:
        query, key = (one.transpose(0, 1).flatten(0, 1) for one in (query, key))
    lengths = batch.boundaries.diff().tolist()
    held = [torch.from_numpy(held_positions(lengths, cut.context, rank)) for rank in range(cut.context)]
    places = held[cut.context_rank].to(query.device)
    if cut.context > 1:
        group: Any = parallel_state.get_context_parallel_group()
        parts = [torch.empty_like(key) for _ in range(cut.context)]
        dist.all_gather(parts, key.contiguous(), group=group)
        key = torch.cat(parts)[torch.argsort(torch.cat(held)).to(key.device)]
    start = 0
    for length in lengths[: batch.num_sequences]:
        mine = (places >= start) & (places < start + length)
        yield _Row(
            query[mine].transpose(0, 1),
            places[mine] - start,
            key[start : start + length].transpose(0, 1),
        )
        start += length
