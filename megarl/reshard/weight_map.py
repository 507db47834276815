"""The local tensors of every rank, in each of the three worlds: checkpoint, Megatron, vLLM.

All three come from the rows of `megarl.reshard.table`. Each function returns the tensors of one
rank by name, in the order of the forward pass, with regions in checkpoint coordinates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from math import lcm
from typing import NamedTuple

from megarl.config import splits
from megarl.config.grid import Grid, chunks_of_stage
from megarl.config.model_shape import ModelShape
from megarl.config.sections import ParallelSettings
from megarl.config.splits import Span, megatron_qkv, vllm_qkv
from megarl.errors import Refusal
from megarl.reshard.boxes import Box, LocalTensor, Region, extents, whole
from megarl.reshard.table import Layout, Row, Stage, axis_sizes, rows_of

#: The checkpoint's name of the output layer.
OUTPUT_LAYER = "lm_head.weight"


@dataclass(frozen=True, slots=True)
class Cut:
    """How one rank of a tensor-parallel group cuts the rows: what differs between Megatron and vLLM.

    `vocabulary`: padded vocabulary in rows; `qkv`: the spans of query (0), key (1) and value (2)
    rows on this rank, in local order.
    """

    shards: int
    rank: int
    vocabulary: int
    qkv: Callable[[ModelShape, int, int], list[Span]]


def hf_tensors(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the checkpoint's tensors, in the order of the forward pass, expert by expert.

    A tied output layer is not stored.
    """
    sizes = axis_sizes(shape)
    tensors: dict[str, tuple[int, ...]] = {}
    for rows, layer in forward_order(rows_of(shape, pipelined=False), range(shape.num_layers), shape):
        for row, expert in with_experts(rows, shape.num_experts):
            for name, axes in row.parts:
                tensors[name.format(layer=layer, expert=expert)] = tuple(sizes[axis] for axis in axes)
    return tensors


def forward_order(rows: Iterable[Row], layers: range, shape: ModelShape) -> Iterator[tuple[list[Row], int]]:
    """The rows before the layers, those of each layer, those after them, each group with its layer (0 outside)."""
    rows = tuple(rows)
    yield [row for row in rows if row.stage == "first"], 0
    for layer in layers:
        yield [row for row in rows if row.stage == "layer" and row.is_in(layer, shape)], layer
    yield [row for row in rows if row.stage == "last"], 0


def with_experts(rows: list[Row], experts: int) -> Iterator[tuple[Row, int]]:
    """Rows with the number of an expert, 0 for rows that are not an expert's; all rows of an expert together."""
    for own, group in groupby(rows, key=lambda row: row.experts):
        found = list(group)
        yield from ((row, expert) for expert in range(experts if own else 1) for row in found)


def check_hf_shapes(shape: ModelShape, found: Mapping[str, tuple[int, ...]], origin: str) -> None:
    """Raise the first of `hf_problems`."""
    for refusal in hf_problems(shape, found, origin):
        raise refusal


def hf_problems(shape: ModelShape, found: Mapping[str, tuple[int, ...]], origin: str) -> Iterator[Refusal]:
    """Each tensor of the checkpoint `origin` that is missing, has another shape, or is none of the model's.

    `found`: shapes by name. Tables of rotary angles, and an output layer beside tied embeddings, are passed over as
    transformers does.
    """
    expected = hf_tensors(shape)
    for name, wanted in expected.items():
        if name not in found:
            yield Refusal(f"{origin} without {name}", "must hold every tensor of the model", "restore the checkpoint")
        elif tuple(found[name]) != wanted:
            yield Refusal(
                f"{name} of shape {tuple(found[name])} in {origin}",
                f"must have shape {wanted} by config.json",
                "use the config.json that belongs to these weights",
            )
    for name in found:
        known = name in expected or name.endswith("rotary_emb.inv_freq")
        if not known and not (shape.tied_embeddings and name == OUTPUT_LAYER):
            yield Refusal(
                f"{name} in {origin}",
                f"is no tensor of a {shape.family} model with this config.json",
                "use the config.json that belongs to these weights, or remove the tensor",
            )


def padded_vocab_size(vocab_size: int, tensor: int = 1, multiple: int = 128) -> int:
    """Rows of Megatron's embedding and output layer: the vocabulary padded for the split.

    Megatron-LM pads to `multiple * tensor`, so the size depends on the layout. Here it is padded to
    the least common multiple of both: with 128, every tensor-parallel size up to 128 that is a power
    of two gives the same size, and shards of 8 ranks keep the multiple of 16 that FP8 kernels want.

    >>> [padded_vocab_size(151_665, tensor) for tensor in (1, 2, 4, 8)]
    [151680, 151680, 151680, 151680]
    """
    step = lcm(multiple, tensor)
    return -(-vocab_size // step) * step


def chunk_prefix(chunk: int, chunks: int) -> str:
    """What the names of a rank's parameters begin with where it holds several model chunks: Megatron names the
    parameters of each chunk alike."""
    return f"chunk{chunk}." if chunks > 1 else ""


def megatron_tensors(
    shape: ModelShape, parallel: ParallelSettings, grid: Grid, vocab_multiple: int = 128
) -> dict[str, LocalTensor]:
    """The parameters of Megatron's GPT model on the rank at `grid`, by the names of `named_parameters`.

    Layers count from 0 in every model chunk; where a rank has several, names begin with `chunk_prefix`.
    `vocab_multiple`: see `padded_vocab_size`. Raises `Refusal` where heads, key-value heads, ffn or layers do not
    divide.
    """
    chunks = len(chunks_of_stage(shape.num_layers, parallel, grid.pipeline_rank))
    tensors: dict[str, LocalTensor] = {}
    for one in megatron_rows(shape, parallel, grid, vocab_multiple):
        name = chunk_prefix(one.chunk, chunks) + one.name
        tensors[name] = _local_tensor(one.row, name, shape, one.cut, one.layer, one.expert)
    return tensors


class PlacedRow(NamedTuple):
    """A row of the table as a parameter of one of Megatron's ranks: its name within the model chunk of that number,
    how it is cut, and its layer and expert, counted over the whole model."""

    chunk: int
    name: str
    row: Row
    cut: Cut
    layer: int
    expert: int


def megatron_rows(
    shape: ModelShape, parallel: ParallelSettings, grid: Grid, vocab_multiple: int = 128
) -> Iterator[PlacedRow]:
    """Every parameter of the rank at `grid`, in the order of the forward pass; see `megatron_tensors`."""
    tensor = grid.tensor
    for refusal in splits.policy_refusals(shape, parallel):
        raise refusal
    vocabulary = padded_vocab_size(shape.vocab_size, tensor, vocab_multiple)
    cut = Cut(tensor, grid.tensor_rank, vocabulary, megatron_qkv)
    expert_cut = Cut(grid.expert_tensor, grid.expert_tensor_rank, vocabulary, megatron_qkv)
    experts = shape.num_experts // grid.expert
    for number, chunk in enumerate(chunks_of_stage(shape.num_layers, parallel, grid.pipeline_rank)):
        stages = {"first": chunk.first, "layer": True, "last": chunk.last}
        present = [row for row in rows_of(shape, pipelined=grid.pipeline > 1) if stages[row.stage]]
        for rows, layer in forward_order(present, chunk.layers, shape):
            for row, local in with_experts(rows, experts):
                name = row.megatron.format(layer=layer - chunk.layers.start, expert=local)
                own_cut, expert = (expert_cut, grid.expert_rank * experts + local) if row.experts else (cut, 0)
                yield PlacedRow(number, name, row, own_cut, layer, expert)


@dataclass(frozen=True, slots=True)
class StoredParameter:
    """A parameter of the whole model in a distributed checkpoint of Megatron's.

    `key` names a tensor of `shape`; the parameter is its part at `index`, the numbers along the leading dimensions, one
    for experts, none else. `tensor` is the parameter itself, `halves` are its pieces along dimension 0 that tensor
    parallelism cuts one by one, and `cut` is the dimension it cuts, None where every rank has all.
    """

    key: str
    shape: tuple[int, ...]
    index: tuple[int, ...]
    tensor: LocalTensor
    halves: int
    cut: int | None
    stage: Stage
    layer: int
    expert: int | None

    @property
    def stacked(self) -> tuple[str, int] | None:
        """Key and place in checkpoints that stack all layers along a leading dimension; None outside the layers."""
        prefix, found, rest = self.key.partition(f".layers.{self.layer}.")
        return (f"{prefix}.layers.{rest}", self.layer) if found else None


#: Layout of a row -> (halves, cut) of `StoredParameter`.
_STORED_CUTS: dict[Layout, tuple[int, int | None]] = {
    "row": (1, 1),
    "qkv": (1, 0),
    "gate_up": (2, 0),
    "vocabulary": (1, 0),
    "replicated": (1, None),
}


def stored_parameters(shape: ModelShape, tensor: int = 1, vocab_multiple: int = 128) -> list[StoredParameter]:
    """The model's parameters as Megatron-core 0.19.2 stores them, in the order of the forward pass.

    `tensor` and `vocab_multiple` pad the vocabulary, as in `padded_vocab_size`. Source of the keys: the
    `sharded_state_dict` methods of its GPTModel, with every layer under a name of its own.
    """
    vocabulary = padded_vocab_size(shape.vocab_size, tensor, vocab_multiple)
    cut = Cut(1, 0, vocabulary, megatron_qkv)
    found: list[StoredParameter] = []
    for rows, layer in forward_order(rows_of(shape, pipelined=False), range(shape.num_layers), shape):
        for row, expert in with_experts(rows, shape.num_experts):
            name = row.megatron.format(layer=layer, expert=expert)
            whole_tensor = _local_tensor(row, name, shape, cut, layer, expert)
            key, lengths, index = name, whole_tensor.shape, ()
            if row.experts:
                # Megatron's names end in the expert's number; its keys have one experts module more.
                key = row.megatron.format(layer=layer, expert="").replace(".experts.", ".experts.experts.")
                lengths, index = (shape.num_experts, *lengths), (expert,)
            halves, axis = _STORED_CUTS[row.layout]
            own = expert if row.experts else None
            found.append(StoredParameter(key, lengths, index, whole_tensor, halves, axis, row.stage, layer, own))
    return found


def vllm_rows(shape: ModelShape, *, tensor: int, expert_parallel: bool) -> tuple[Row, ...]:
    """The rows that an engine has a parameter for, in the order of the forward pass.

    Raises `Refusal` where sizes do not divide, and where vLLM's class has no parameter for one of the checkpoint's
    tensors.
    """
    for refusal in splits.engine_refusals(shape, tensor, expert_parallel):
        raise refusal
    rows = rows_of(shape, pipelined=False)
    for row in rows:
        if row.vllm is None:
            raise Refusal(
                f"{row.parts[0][0].format(layer=0, expert=0)} of a {shape.family} model",
                f"has no place in vLLM's class for {shape.family}",
                "use a model without it",
            )
    return rows


def vllm_cuts(shape: ModelShape, *, tensor: int, tensor_rank: int, expert_parallel: bool) -> tuple[Cut, Cut, range]:
    """How an engine's rank cuts the rows, how those of experts, and which experts it has."""
    cut = Cut(tensor, tensor_rank, splits.vllm_vocabulary(shape), vllm_qkv)
    if not expert_parallel:
        return cut, cut, range(shape.num_experts)
    share = shape.num_experts // tensor
    return cut, replace(cut, shards=1, rank=0), range(tensor_rank * share, (tensor_rank + 1) * share)


def vllm_tensors(
    shape: ModelShape, *, tensor: int, tensor_rank: int, expert_parallel: bool = False
) -> dict[str, LocalTensor]:
    """The parameters of vLLM's model class on one rank of an engine, before any packing.

    Key-value heads are repeated over ranks where there are fewer of them than ranks; tied models have no
    `lm_head.weight`. With `expert_parallel` each rank has whole experts, `num_experts` ÷ `tensor` consecutive ones.
    Raises `Refusal` as `vllm_rows` does.
    """
    rows = vllm_rows(shape, tensor=tensor, expert_parallel=expert_parallel)
    cut, expert_cut, own = vllm_cuts(shape, tensor=tensor, tensor_rank=tensor_rank, expert_parallel=expert_parallel)
    tensors: dict[str, LocalTensor] = {}
    for present, layer in forward_order(rows, range(shape.num_layers), shape):
        for row in present:
            if row.vllm is None:
                continue
            name = row.vllm.format(layer=layer)
            if row.experts:
                stack = [_local_tensor(row, name, shape, expert_cut, layer, expert) for expert in own]
                tensors[name] = _stacked(stack)
            else:
                tensors[name] = _local_tensor(row, name, shape, cut, layer, 0)
    return tensors


def _stacked(tensors: Sequence[LocalTensor]) -> LocalTensor:
    """Tensors of one shape as one with a leading dimension."""
    regions = tuple(
        replace(region, local_box=((index, index + 1), *region.local_box))
        for index, tensor in enumerate(tensors)
        for region in tensor.regions
    )
    return LocalTensor(tensors[0].name, (len(tensors), *tensors[0].shape), regions)


def _spans(row: Row, shape: ModelShape, cut: Cut, rows: int) -> tuple[list[Span], int]:
    """The checkpoint rows of a fused tensor on this rank in local order, and the local tensor's number of rows.

    `rows` is the length of dimension 0 of each part, where the layout has equal parts.
    """
    if row.layout == "qkv":
        spans = cut.qkv(shape, cut.shards, cut.rank)
    elif row.layout == "gate_up":
        share = rows // cut.shards
        spans = [(part, cut.rank * share, (cut.rank + 1) * share) for part in range(len(row.parts))]
    elif row.layout == "vocabulary":
        share = cut.vocabulary // cut.shards
        start, stop = cut.rank * share, min((cut.rank + 1) * share, rows)
        return ([(0, start, stop)] if start < stop else []), share
    else:
        spans = [(0, 0, rows)]
    return spans, sum(stop - start for _, start, stop in spans)


class PartBox(NamedTuple):
    """Where a box of one of a row's checkpoint tensors, number `part`, lies in the row's local tensor."""

    part: int
    hf_box: Box
    local_box: Box


def cut_row(row: Row, shape: ModelShape, cut: Cut) -> tuple[tuple[int, ...], list[PartBox]]:
    """The shape of a row's tensor on one rank, and the boxes in it, in local order."""
    sizes = axis_sizes(shape)
    dims = [sizes[axis] for axis in row.parts[0][1]]
    columns = whole(dims[1:])
    if row.layout == "row":
        share = dims[1] // cut.shards
        columns = ((cut.rank * share, (cut.rank + 1) * share),)
    spans, rows = _spans(row, shape, cut, dims[0])
    boxes: list[PartBox] = []
    offset = 0
    for part, start, stop in spans:
        local_box = ((offset, offset + stop - start), *whole(extents(columns)))
        boxes.append(PartBox(part, ((start, stop), *columns), local_box))
        offset += stop - start
    return (rows, *extents(columns)), boxes


def _local_tensor(row: Row, name: str, shape: ModelShape, cut: Cut, layer: int, expert: int) -> LocalTensor:
    """A row's tensor of one layer and expert of the whole model, 0 where a row has none."""
    local_shape, boxes = cut_row(row, shape, cut)
    regions = (
        Region(row.parts[part][0].format(layer=layer, expert=expert), hf_box, local_box)
        for part, hf_box, local_box in boxes
    )
    return LocalTensor(name, local_shape, tuple(regions))
