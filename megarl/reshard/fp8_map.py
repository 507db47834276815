"""FP8 weights in the weight map: which rows are quantised, how their scales are laid out, and what a rank quantises.

A quantised weight (N, K) is two tensors, as vLLM, DeepSeek and Qwen store them: its e4m3 values under its own name, and
fp32 scales (ceil(N / 128), ceil(K / 128)) under that name and `_scale_inv`, one for each block of 128 x 128. Blocks are
counted in the checkpoint's tensors: query, key, value, gate and up have blocks of their own, wherever they are fused.
So a rank quantises its part of each checkpoint tensor on its own, and has what the whole tensor's quantisation has
there, as long as parts begin and end on multiples of 128: `megarl.config.block_rules` sees to it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megarl.config.model_shape import ModelShape
from megarl.config.quantisation import BLOCK, BLOCK_FP8, blocks, scale_name
from megarl.reshard.boxes import Box, LocalTensor, Region, extents, whole
from megarl.reshard.layout import Layout, Place, Split, Spread
from megarl.reshard.table import Row, axis_sizes, rows_of
from megarl.reshard.weight_map import forward_order, hf_tensors, with_experts
from megarl.reshard.wire import Kind, Wire


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


def quantization_config(shape: ModelShape) -> dict[str, Any]:
    """`quantization_config` of such a checkpoint of the model, with the linear layers that are not quantised: vLLM's
    Qwen3 class asks, where others leave routers alone; transformers asks for all, an output layer that is tied to the
    embedding among them."""
    quantised, whole_layers = quantised_weights(shape), ["lm_head"]
    for name, dims in hf_tensors(shape).items():
        layer = name.removesuffix(".weight")
        if len(dims) == 2 and name not in quantised and not layer.endswith("embed_tokens") and layer != "lm_head":
            whole_layers.append(layer)
    return BLOCK_FP8 | {"modules_to_not_convert": whole_layers}


def quantised_wire(weights: Collection[str], rest: Kind) -> Wire:
    """Values of `weights` travel in e4m3, their scales in fp32, everything else as `rest`."""
    scales = set(map(scale_name, weights))

    def wire(name: str) -> Kind:
        return "e4m3" if name in weights else "fp32" if name in scales else rest

    return wire


def with_scales(layout: Layout, weights: Collection[str]) -> Layout:
    """A layout of an engine or a checkpoint with the scales of `weights` beside them, in tensors of their own."""
    splits: dict[int, Split] = {}
    found: dict[str, list[Spread]] = {}
    for name, spreads in layout.items():
        found[name] = list(spreads)
        if name in weights:
            for spread in spreads:
                if id(spread.split) not in splits:
                    splits[id(spread.split)] = _in_blocks(spread.split)
            found[scale_name(name)] = [
                Spread(scale_name(spread.tensor), spread.index, splits[id(spread.split)]) for spread in spreads
            ]
    return found


def in_parts(layout: Layout, weights: Collection[str]) -> Layout:
    """A layout of the policy as it is sent: of `weights` each rank has its part of the checkpoint's tensor, and that
    part's scales, both by the checkpoint's names."""
    splits: dict[int, tuple[Split, Split]] = {}
    found: dict[str, list[Spread]] = {}
    for name, spreads in layout.items():
        if name not in weights:
            found[name] = list(spreads)
            continue
        for spread in spreads:
            if id(spread.split) not in splits:
                values = _merged(spread.split)
                splits[id(spread.split)] = values, _in_blocks(values)
            values, scales = splits[id(spread.split)]
            found.setdefault(name, []).append(Spread(name, (), values))
            found.setdefault(scale_name(name), []).append(Spread(scale_name(name), (), scales))
    return found


def local_scales(tensors: Mapping[str, LocalTensor], weights: Collection[str]) -> dict[str, LocalTensor]:
    """A rank's tensors of an engine or a checkpoint with their scales, as `with_scales` has them on all ranks."""
    found: dict[str, LocalTensor] = {}
    for name, tensor in tensors.items():
        found[name] = tensor
        regions = [region for region in tensor.regions if region.hf_name in weights]
        if regions:
            *leading, rows, columns = tensor.shape
            lengths = (*leading, blocks(rows), blocks(columns))
            scales = (
                Region(scale_name(one.hf_name), block_box(one.hf_box), _local_block_box(one.local_box))
                for one in regions
            )
            found[scale_name(name)] = LocalTensor(scale_name(name), lengths, tuple(scales))
    return found


@dataclass(frozen=True, slots=True)
class WeightPart:
    """A rank's part of the checkpoint tensor `name`: the boxes of its tensor `tensor` in the order of the checkpoint's
    rows, which together are `box` there."""

    name: str
    tensor: str
    box: Box
    local_boxes: tuple[Box, ...]


def weight_parts(tensors: Mapping[str, LocalTensor], weights: Collection[str]) -> Iterator[WeightPart]:
    """What a rank of the policy quantises, tensor by tensor."""
    for name, tensor in tensors.items():
        regions: dict[str, list[Region]] = {}
        for region in tensor.regions:
            if region.hf_name in weights:
                regions.setdefault(region.hf_name, []).append(region)
        for hf_name, found in regions.items():
            found.sort(key=lambda region: region.hf_box)
            box = _joined([region.hf_box for region in found])
            yield WeightPart(hf_name, name, box, tuple(region.local_box for region in found))


def local_parts(tensors: Mapping[str, LocalTensor], weights: Collection[str]) -> dict[str, LocalTensor]:
    """A rank's tensors of the policy as they are sent, as `in_parts` has them on all ranks."""
    parts = list(weight_parts(tensors, weights))
    cut = {part.tensor for part in parts}
    found = {name: tensor for name, tensor in tensors.items() if name not in cut}
    for part in parts:
        boxes = {part.name: part.box, scale_name(part.name): block_box(part.box)}
        for name, box in boxes.items():
            lengths = extents(box)
            found[name] = LocalTensor(name, lengths, (Region(name, box, whole(lengths)),))
    return found


def _merged(split: Split) -> Split:
    """The same boxes of the checkpoint's tensor with those of a rank as one, which is a tensor of its own there."""
    owners: dict[Box, list[int]] = {}
    for rank, numbers in split.of_rank.items():
        box = _joined(sorted(split.places[number].hf_box for number in numbers))
        owners.setdefault(box, []).append(rank)
    return Split(tuple(Place(tuple(sorted(ranks)), box, whole(extents(box))) for box, ranks in owners.items()))


def _joined(boxes: list[Box]) -> Box:
    """Boxes that follow each other along the rows, as one."""
    rows, *columns = boxes[0]
    for following, *same in boxes[1:]:
        if following[0] != rows[1] or same != columns:
            raise ValueError(f"boxes {boxes} do not follow each other")
        rows = rows[0], following[1]
    return (rows, *columns)


def _in_blocks(split: Split) -> Split:
    """The places of the scales of a tensor that is cut like `split`."""
    return Split(
        tuple(Place(one.ranks, block_box(one.hf_box), _local_block_box(one.local_box)) for one in split.places)
    )


def block_box(box: Box) -> Box:
    """The scales of a box of a matrix; its ends must be those of blocks, or the matrix's."""
    if any(start % BLOCK for start, _ in box):
        raise ValueError(f"a box of FP8 values {box} begins within a block of {BLOCK}")
    return tuple((start // BLOCK, blocks(stop)) for start, stop in box)


def _local_block_box(box: Box) -> Box:
    """As `block_box`, of a matrix that may be one of a stack."""
    return (*box[:-2], *block_box(box[-2:]))
