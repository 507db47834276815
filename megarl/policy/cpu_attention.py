"""Causal attention for the CPU, packed or padded, with rotary embedding inside.

Packed sequences are spread to one padded row each, so that one call of PyTorch's attention serves all of
them: right padding is invisible to a causal mask. Cosines, sines and the spreading index are made once
per micro-batch and travel as `CpuPacking` in Megatron's `packed_seq_params` argument.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig

from megarl.policy.batch import MicroBatch


@dataclass
class CpuPacking(PackedSeqParams):
    """What the attention of one micro-batch shares between layers.

    cos, sin (S, B, 1, D/2·2) in the order of the hidden states; spread int64 (N, L): flat row of each
    sequence's tokens, padding pointing at row 0; collect int64 (S,): place of each row in (N·L). The last two are
    None for an unpacked micro-batch, whose rows are padded already.
    """

    cos: torch.Tensor | None = None
    sin: torch.Tensor | None = None
    spread: torch.Tensor | None = None
    collect: torch.Tensor | None = None


def cpu_packing(batch: MicroBatch, inverse_frequencies: torch.Tensor, scaling: float, dtype: torch.dtype) -> CpuPacking:
    """Make the shared part of one micro-batch; `scaling` multiplies cosine and sine (yarn)."""
    angles = batch.positions.T.float()[:, :, None, None] * inverse_frequencies
    angles = torch.cat((angles, angles), dim=-1)
    spread = collect = None
    if batch.packed:
        starts = batch.boundaries[:-1].long()
        lengths = batch.boundaries.diff().long()
        longest = int(lengths.max())
        place = torch.arange(longest)
        spread = torch.where(place < lengths[:, None], starts[:, None] + place, 0)
        owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        collect = owner * longest + torch.arange(len(owner)) - starts[owner]
    # Named sbhd in both cases: Megatron then keeps (S, B, heads, D) and leaves the packing to this module.
    return CpuPacking(
        qkv_format="sbhd",
        max_seqlen_q=batch.longest,
        max_seqlen_kv=batch.longest,
        cos=(angles.cos() * scaling).to(dtype),
        sin=(angles.sin() * scaling).to(dtype),
        spread=spread,
        collect=collect,
    )


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
        steps, rows, heads, width = query.shape
        repeats = heads // key.shape[2]
        q, k, v = (self._by_sequence(t, packing) for t in (query, key, value))
        if repeats > 1:
            k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.softmax_scale)
        if packing.collect is None:
            return out.permute(2, 0, 1, 3).reshape(steps, rows, heads * width)
        flat = out.transpose(1, 2).reshape(-1, heads * width)
        return flat.index_select(0, packing.collect).unsqueeze(1)

    @staticmethod
    def _by_sequence(x: torch.Tensor, packing: CpuPacking) -> torch.Tensor:
        """(S, B, heads, D) -> (sequences, heads, length, D)."""
        if packing.spread is None:
            return x.permute(1, 2, 0, 3)
        rows = x.squeeze(1).index_select(0, packing.spread.view(-1))
        return rows.view(*packing.spread.shape, x.shape[2], x.shape[3]).transpose(1, 2)
