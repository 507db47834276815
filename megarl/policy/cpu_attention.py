"""Causal attention for the CPU, packed or padded, with rotary embedding inside, under context parallelism too.

Packed sequences are spread to one padded row each, so that one call of PyTorch's attention serves all of
them. Under context parallelism a rank holds the queries of its tokens and gathers the keys and values of the others';
for the backward pass it keeps its own alone and gathers again. What the layers share is made once per micro-batch and
travels as `CpuPacking` in Megatron's `packed_seq_params` argument.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.utils.checkpoint import checkpoint

from megarl.parallel.context import held_positions
from megarl.policy.batch import MicroBatch


@dataclass(frozen=True)
class Rows:
    """Spreads tokens that stand end to end to one padded row per sequence, and collects them again.

    spread int64 (N, L): flat place of each sequence's tokens, padding pointing at place 0; collect int64 (S,): place of
    each token in (N·L).
    """

    spread: torch.Tensor
    collect: torch.Tensor


@dataclass(frozen=True)
class Gathered:
    """How the tokens of a context-parallel group become whole rows.

    order int64 (S·context,): place of each token of the whole among the ranks' tokens end to end. bias (N, 1, L, K), in
    the layers' type: 0 where a query may look, else -inf; N is 1 for padded rows, which are all alike.
    """

    group: dist.ProcessGroup
    order: torch.Tensor
    bias: torch.Tensor


@dataclass
class CpuPacking(PackedSeqParams):
    """What the attention of one micro-batch shares between layers.

    cos, sin (S, B, 1, D/2·2) in the order of the hidden states. queries, keys: rows of packed sequences, of this rank's
    tokens and of all; None for an unpacked micro-batch, whose rows are padded already. gathered: with context
    parallelism alone.
    """

    cos: torch.Tensor | None = None
    sin: torch.Tensor | None = None
    queries: Rows | None = None
    keys: Rows | None = None
    gathered: Gathered | None = None


def cpu_packing(
    batch: MicroBatch,
    inverse_frequencies: torch.Tensor,
    scaling: float,
    dtype: torch.dtype,
    context_group: dist.ProcessGroup | None = None,
) -> CpuPacking:
    """Make the shared part of one micro-batch; `scaling` multiplies cosine and sine (yarn)."""
    angles = batch.positions.T.float()[:, :, None, None] * inverse_frequencies
    angles = torch.cat((angles, angles), dim=-1)
    context = 1 if context_group is None else dist.get_world_size(context_group)
    lengths = batch.boundaries.diff().long()
    queries = keys = None
    if batch.packed:
        keys = _rows(lengths)
        queries = keys if context == 1 else _rows(lengths // context)
    gathered = None
    if context_group is not None and context > 1:
        whole = lengths.tolist() if batch.packed else [int(lengths[0])]
        places = torch.cat([torch.from_numpy(held_positions(whole, context, rank)) for rank in range(context)])
        gathered = Gathered(context_group, torch.argsort(places), _causal_bias(batch, queries, dtype))
    # Named sbhd in both cases: Megatron then keeps (S, B, heads, D) and leaves the packing to this module.
    return CpuPacking(
        qkv_format="sbhd",
        max_seqlen_q=batch.longest,
        max_seqlen_kv=batch.longest,
        cos=(angles.cos() * scaling).to(dtype),
        sin=(angles.sin() * scaling).to(dtype),
        queries=queries,
        keys=keys,
        gathered=gathered,
    )


def _rows(lengths: torch.Tensor) -> Rows:
    """One padded row for each of the sequences, which stand end to end."""
    starts = lengths.cumsum(0) - lengths
    longest = int(lengths.max())
    place = torch.arange(longest)
    spread = torch.where(place < lengths[:, None], starts[:, None] + place, 0)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    return Rows(spread, owner * longest + torch.arange(len(owner)) - starts[owner])


def _causal_bias(batch: MicroBatch, queries: Rows | None, dtype: torch.dtype) -> torch.Tensor:
    """A query may look at the keys of its sequence up to its own position."""
    own = batch.positions[0][queries.spread] if queries is not None else batch.positions[:1]
    visible = torch.arange(batch.longest) <= own[:, :, None]
    return torch.zeros((), dtype=dtype).masked_fill(~visible, -torch.inf)[:, None]


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding, half-split convention: x (S, B, heads, D), cos and sin (S, B, 1, D)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class CpuAttention(torch.nn.Module):
    """Core attention: (S, B, heads, D) queries, (S, B, kv heads, D) keys and values -> (S, B, heads·D)."""

    def __init__(
        self, config: TransformerConfig, layer_number: int, softmax_scale: float | None = None, **_: Any
    ) -> None:
        super().__init__()
        self.layer_number = layer_number
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        packed_seq_params: CpuPacking,
        **_: Any,
    ) -> torch.Tensor:
        packing = packed_seq_params
        assert packing.cos is not None and packing.sin is not None
        query = rotate(query, packing.cos, packing.sin)
        key = rotate(key, packing.cos, packing.sin)
        if packing.gathered is None:
            return self._attend(query, key, value, packing)
        if not torch.is_grad_enabled():
            return self._attend_gathered(query, key, value, packing)
        again: Callable[..., Any] = checkpoint
        return again(self._attend_gathered, query, key, value, packing, use_reentrant=False, preserve_rng_state=False)

    def _attend_gathered(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packing: CpuPacking
    ) -> torch.Tensor:
        """Attention of this rank's queries to the keys and values of the whole context-parallel group."""
        gathered = packing.gathered
        assert gathered is not None
        # Forward the ranks' tokens end to end; backward the sum of all ranks' gradients of one's own.
        both: torch.Tensor = gather_from_sequence_parallel_region(torch.cat((key, value), dim=-1), group=gathered.group)
        key, value = both.index_select(0, gathered.order).chunk(2, dim=-1)
        return self._attend(query, key, value, packing)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packing: CpuPacking) -> torch.Tensor:
        steps, rows, heads, width = query.shape
        repeats = heads // key.shape[2]
        q = _by_sequence(query, packing.queries)
        k, v = (_by_sequence(t, packing.keys) for t in (key, value))
        if repeats > 1:
            k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        bias = None if packing.gathered is None else packing.gathered.bias
        # Right padding is invisible to a causal mask.
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=bias is None, scale=self.softmax_scale)
        if packing.queries is None:
            return out.permute(2, 0, 1, 3).reshape(steps, rows, heads * width)
        flat = out.transpose(1, 2).reshape(-1, heads * width)
        return flat.index_select(0, packing.queries.collect).unsqueeze(1)


def _by_sequence(x: torch.Tensor, rows: Rows | None) -> torch.Tensor:
    """(S, B, heads, D) -> (sequences, heads, length, D)."""
    if rows is None:
        return x.permute(1, 2, 0, 3)
    flat = x.squeeze(1).index_select(0, rows.spread.view(-1))
    return flat.view(*rows.spread.shape, x.shape[2], x.shape[3]).transpose(1, 2)
