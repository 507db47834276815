"""Which adapters lie on a rank, and how their products come together to a change of Megatron's fused tensors.

An adapter is that of one linear layer of the Hugging Face model: A (rank, inputs) and B (outputs, rank), of which W
becomes W + s B A. Megatron keeps query, key and value in one tensor, interleaved by group, and gate and up in one: the
rows of the table say which rows of a local tensor are which adapter's. The factor that tensor parallelism cuts is the
one with the dimension of W that it cuts: B's rows in a column-parallel layer, A's columns in a row-parallel one. Each
rank has a whole copy of the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from megarl.config.adapters import is_target
from megarl.config.grid import Grid
from megarl.config.model_shape import ModelShape
from megarl.config.sections import ParallelSettings
from megarl.reshard.table import Row, axis_sizes, rows_of
from megarl.reshard.weight_map import OUTPUT_LAYER, PlacedRow, cut_row, forward_order, megatron_rows, with_experts

_WEIGHT = ".weight"


@dataclass(frozen=True, slots=True)
class LowRank:
    """One linear layer's adapter on a rank: rows `rows` of B and columns `columns` of A, as [start, stop).

    `name` is the layer's in the Hugging Face model, `outputs` and `inputs` are the whole layer's sizes. `cut` says
    which factor is this rank's part of what the ranks of a tensor-parallel group share out; they have whole copies of
    the other, or of both. Rows beyond `outputs` are padding of the vocabulary. `expert`: whether the group is that of
    experts.
    """

    name: str
    outputs: int
    inputs: int
    rows: tuple[int, int]
    columns: tuple[int, int]
    cut: Literal["rows", "columns"] | None
    shards: int
    shard: int
    expert: bool

    @property
    def whole_rows(self) -> int:
        """Rows of B over all ranks, padding included."""
        return (self.rows[1] - self.rows[0]) * (self.shards if self.cut == "rows" else 1)


class Piece(NamedTuple):
    """Consecutive rows of a local tensor: those [start, stop) of the product of adapter number `of`, counted from the
    rank's first row of it, or of none where `of` is None."""

    of: int | None
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class AdaptedTensor:
    """A parameter of Megatron's with the adapters of its rows; `chunk` and `name` as in `PlacedRow`.

    `pieces` are all of its rows in order.
    """

    chunk: int
    name: str
    adapters: tuple[LowRank, ...]
    pieces: tuple[Piece, ...]


def adapted_tensors(
    shape: ModelShape, parallel: ParallelSettings, grid: Grid, targets: Sequence[str]
) -> Iterator[AdaptedTensor]:
    """The parameters of the rank at `grid` that adapters change, in the order of the forward pass.

    `targets`: see `is_target`.
    """
    for placed in megatron_rows(shape, parallel, grid):
        if takes_adapter(placed.row):
            found = _adapted(placed, shape, targets)
            if found.adapters:
                yield found


def adapters_of(shape: ModelShape, targets: Sequence[str]) -> dict[str, tuple[int, int]]:
    """The linear layers with an adapter in the order of the forward pass: outputs and inputs by name."""
    sizes, found = axis_sizes(shape), dict[str, tuple[int, int]]()
    for rows, layer in forward_order(rows_of(shape, pipelined=False), range(shape.num_layers), shape):
        for row, expert in with_experts([row for row in rows if takes_adapter(row)], shape.num_experts):
            for part, axes in row.parts:
                name = part.format(layer=layer, expert=expert).removesuffix(_WEIGHT)
                if is_target(name, targets):
                    outputs, inputs = (sizes[axis] for axis in axes)
                    found[name] = outputs, inputs
    return found


def takes_adapter(row: Row) -> bool:
    """Whether a row is of linear layers that can have adapters: routers, gates and embeddings cannot."""
    return row.parts[0][0] == OUTPUT_LAYER or (row.layout in ("row", "qkv", "gate_up") and len(row.parts[0][1]) == 2)


def _adapted(placed: PlacedRow, shape: ModelShape, targets: Sequence[str]) -> AdaptedTensor:
    row, cut, sizes = placed.row, placed.cut, axis_sizes(shape)
    (local_rows, _), boxes = cut_row(row, shape, cut)
    adapters: list[LowRank] = []
    numbers: dict[int, int] = {}
    for part, (hf_name, axes) in enumerate(row.parts):
        name = hf_name.format(layer=placed.layer, expert=placed.expert).removesuffix(_WEIGHT)
        if not is_target(name, targets):
            continue
        outputs, inputs = (sizes[axis] for axis in axes)
        own = [box.hf_box for box in boxes if box.part == part]
        rows, columns, axis = (0, outputs), (0, inputs), None
        if cut.shards > 1 and row.layout == "row":
            columns, axis = own[0][1], "columns"
        elif cut.shards > 1 and _is_even(row, shape, cut.shards):
            start = cut.rank * local_rows if row.layout == "vocabulary" else min(box[0][0] for box in own)
            size = local_rows if row.layout == "vocabulary" else outputs // cut.shards
            rows, axis = (start, start + size), "rows"
        elif row.layout == "vocabulary":
            rows = (0, local_rows)
        numbers[part] = len(adapters)
        adapters.append(LowRank(name, outputs, inputs, rows, columns, axis, cut.shards, cut.rank, expert=row.experts))
    pieces: list[Piece] = []
    for box in boxes:
        (start, stop), number = box.hf_box[0], numbers.get(box.part)
        first = 0 if number is None else adapters[number].rows[0]
        pieces.append(Piece(number, start - first, stop - first))
    covered = sum(piece.stop - piece.start for piece in pieces)
    if covered < local_rows:
        pieces.append(Piece(None, covered, local_rows))
    return AdaptedTensor(placed.chunk, placed.name, tuple(adapters), tuple(pieces))


def _is_even(row: Row, shape: ModelShape, shards: int) -> bool:
    """Whether every rank has an equal share of each part's rows. With fewer key-value heads than ranks the cut falls
    inside a group, and a rank may have rows of none but the queries."""
    return row.layout != "qkv" or shape.num_kv_heads % shards == 0
