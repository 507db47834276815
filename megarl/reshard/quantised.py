"""FP8 weights in the weight map: which rows are quantised, and what their scales are called and shaped.

A quantised weight (N, K) is two tensors, as vLLM, DeepSeek and Qwen store them: its e4m3 values under its own name, and
fp32 scales (ceil(N / 128), ceil(K / 128)) under that name and `_scale_inv`, one for each block of 128 x 128. Blocks are
counted in the checkpoint's tensors: query, key, value, gate and up have blocks of their own, wherever they are fused.
"""

from __future__ import annotations

from megarl.config.model_shape import ModelShape
from megarl.config.quantisation import blocks
from megarl.reshard.table import Row, axis_sizes, rows_of
from megarl.reshard.weight_map import forward_order, with_experts


def is_quantised(row: Row) -> bool:
    """Whether a row is one of those that FP8 checkpoints and engines have in FP8: weights of the linear layers of
    decoder layers, experts and shared experts among them; not embeddings, the output layer, norms, biases, routers and
    the gates of shared experts."""
    return row.stage == "layer" and row.layout in ("row", "qkv", "gate_up") and len(row.parts[0][1]) == 2


def quantised_weights(shape: ModelShape) -> dict[str, tuple[int, int]]:
    """The checkpoint's quantised weights by name, in the order of the forward pass, and the shapes of their scales."""
    sizes, found = axis_sizes(shape), dict[str, tuple[int, int]]()
    rows = [row for row in rows_of(shape, pipelined=False) if is_quantised(row)]
    for group, layer in forward_order(rows, range(shape.num_layers), shape):
        for row, expert in with_experts(group, shape.num_experts):
            for name, axes in row.parts:
                outputs, inputs = (blocks(sizes[axis]) for axis in axes)
                found[name.format(layer=layer, expert=expert)] = outputs, inputs
    return found
