"""What a forward pass through the policy's real layers saves for the backward pass, counted by PyTorch's own hooks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from megarl.policy.batch import lay_out
from megarl.records import Sequence, from_place

TOKENS = 32


def saved_bytes_per_token(policy: Any) -> float:
    """Bytes that one micro-batch of `TOKENS` tokens, one sequence, keeps on this rank, per token of the whole.

    Tensors that share memory count once; weights and what all layers share (rotary tables, places in rows) not at all.
    """
    ones = np.ones(TOKENS - 8, np.float32)
    tokens = np.arange(TOKENS, dtype=np.int32) + 2
    sequence = Sequence(tokens=tokens, positions=from_place(8, TOKENS), advantages=ones)
    batch = lay_out([sequence], packed=True, cut=policy.passes.cut)
    if policy.passes.experts is not None:
        policy.passes.experts.begin([batch], policy.passes.cut.sequence_parallel, training=True)
    arguments = policy.passes.forward_arguments.of(batch)
    packing = arguments["packed_seq_params"]
    shared = [packing.cos, packing.sin, *(part for rows in (packing.queries, packing.keys) for part in rows_of(rows))]
    for wrapped in policy.trained["policy"].wrapped:
        shared += [buffer.param_data for buffer in (*wrapped.buffers, *wrapped.expert_parallel_buffers)]
        wrapped.train()
    known = {place(tensor) for tensor in (*shared, arguments["input_ids"])}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        # The tensor is held, or its place would serve another.
        kept.setdefault(place(tensor), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = policy.trained["policy"].wrapped[0](**arguments)
    found = sum(t.untyped_storage().nbytes() for where, t in kept.items() if where not in known)
    assert output.requires_grad
    return found / TOKENS


def rows_of(rows: Any) -> tuple[torch.Tensor, ...]:
    """The tensors of a `Rows`, which may be None."""
    return () if rows is None else (rows.spread, rows.collect)


def place(tensor: torch.Tensor) -> int:
    """Where a tensor's memory begins."""
    return tensor.untyped_storage().data_ptr()
