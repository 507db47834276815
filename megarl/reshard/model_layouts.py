"""The layouts of a model over all ranks of a run, in each of the three worlds: Megatron, vLLM, checkpoint.

They say of all ranks what `megarl.reshard.weight_map` says of one, from the same rows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from math import prod

from megarl.config import splits
from megarl.config.grid import chunks_of_stage, grid_of_rank
from megarl.config.model_shape import ModelShape
from megarl.config.sections import ParallelSettings
from megarl.config.splits import megatron_qkv
from megarl.reshard.boxes import Box, whole
from megarl.reshard.layout import Layout, Place, Split, Spread
from megarl.reshard.table import Row, rows_of
from megarl.reshard.weight_map import (
    Cut,
    chunk_prefix,
    cut_row,
    forward_order,
    hf_tensors,
    padded_vocab_size,
    vllm_cuts,
    vllm_rows,
    with_experts,
)


def policy_layout(shape: ModelShape, parallel: ParallelSettings, world: int, vocab_multiple: int = 128) -> Layout:
    """Megatron's parameters on all ranks, as `megatron_tensors` has them on one.

    Experts come by their number on a rank: the ranks that share a layer's experts then have their turns together.
    Raises `Refusal` as `megatron_tensors` does.
    """
    for refusal in splits.policy_refusals(shape, parallel):
        raise refusal
    vocabulary = padded_vocab_size(shape.vocab_size, parallel.tensor, vocab_multiple)
    experts = shape.num_experts // parallel.expert
    layout: dict[str, list[Spread]] = defaultdict(list)
    rows = rows_of(shape, pipelined=parallel.pipeline > 1)
    for stage, owners in enumerate(_owners(parallel, world)):
        cuts = {
            (row, group): _splits(
                row, shape, [(Cut(len(shards), n, vocabulary, megatron_qkv), ranks) for n, ranks in shards.items()]
            )
            for row in rows
            for group, shards in owners[row.experts].items()
        }
        chunks = chunks_of_stage(shape.num_layers, parallel, stage)
        for number, chunk in enumerate(chunks):
            prefix = chunk_prefix(number, len(chunks))
            held = {"first": chunk.first, "layer": True, "last": chunk.last}
            present = [row for row in rows if held[row.stage]]
            for group, layer in forward_order(present, chunk.layers, shape):
                for row, local in with_experts(group, experts):
                    name = prefix + row.megatron.format(layer=layer - chunk.layers.start, expert=local)
                    for expert_rank in owners[row.experts]:
                        for (part, _), split in zip(row.parts, cuts[row, expert_rank], strict=True):
                            hf_name = part.format(layer=layer, expert=expert_rank * experts + local)
                            layout[hf_name].append(Spread(name, (), split))
    return dict(layout)


def lanes(parallel: ParallelSettings, world: int) -> list[int]:
    """The pipeline stage of every rank."""
    return [grid_of_rank(rank, world, parallel).pipeline_rank for rank in range(world)]


def engine_layout(shape: ModelShape, *, tensor: int, world: int, expert_parallel: bool = False) -> Layout:
    """vLLM's parameters on all ranks, as `vllm_tensors` has them on one; rank r of a run is r % `tensor` of its engine.

    Raises `Refusal` as `vllm_tensors` does.
    """
    rows = vllm_rows(shape, tensor=tensor, expert_parallel=expert_parallel)
    owners = [range(rank, world, tensor) for rank in range(tensor)]
    ranks = [
        vllm_cuts(shape, tensor=tensor, tensor_rank=rank, expert_parallel=expert_parallel) for rank in range(tensor)
    ]
    dense = {row: _splits(row, shape, [(cut, owners[n]) for n, (cut, _, _) in enumerate(ranks)]) for row in rows}
    # Ranks with the same experts share each of them: all of an engine, or with expert parallelism one.
    holders: dict[range, list[int]] = defaultdict(list)
    for rank, (_, _, own) in enumerate(ranks):
        holders[own].append(rank)
    layout: dict[str, list[Spread]] = defaultdict(list)
    for own, tensor_ranks in holders.items():
        experts = {
            row: _splits(row, shape, [(ranks[n][1], owners[n]) for n in tensor_ranks]) for row in rows if row.experts
        }
        for group, layer in forward_order(rows, range(shape.num_layers), shape):
            for row in group:
                name = (row.vllm or "").format(layer=layer)
                # What is no expert's comes once, with the first ranks' experts.
                for expert in own if row.experts else range(own.start == 0):
                    for (part, _), split in zip(row.parts, (experts if row.experts else dense)[row], strict=True):
                        hf_name = part.format(layer=layer, expert=expert)
                        index = (expert - own.start,) if row.experts else ()
                        layout[hf_name].append(Spread(name, index, split))
    return dict(layout)


def checkpoint_layout(shape: ModelShape, writers: Sequence[int]) -> Layout:
    """Whole tensors of a Hugging Face checkpoint, consecutive ones on each rank of `writers`, of nearly equal size.

    A plan with these as targets is an export.
    """
    tensors = hf_tensors(shape)
    total = sum(map(prod, tensors.values()))
    splits_of: dict[tuple[int, tuple[int, ...]], Split] = {}
    layout: dict[str, list[Spread]] = {}
    before = 0
    for name, dims in tensors.items():
        # The share in which the tensor's middle falls.
        share = (2 * before + prod(dims)) * len(writers) // (2 * total)
        before += prod(dims)
        key = writers[share], dims
        if key not in splits_of:
            splits_of[key] = Split((Place((key[0],), whole(dims), whole(dims)),))
        layout[name] = [Spread(name, (), splits_of[key])]
    return layout


def _owners(parallel: ParallelSettings, world: int) -> list[tuple[dict[int, dict[int, list[int]]], ...]]:
    """For every stage, the ranks of each shard: of rows that are no experts' (all in group 0), and of experts' by
    their expert-parallel rank."""
    found: list[tuple[dict[int, dict[int, list[int]]], ...]] = [({}, {}) for _ in range(parallel.pipeline)]
    for rank in range(world):
        grid = grid_of_rank(rank, world, parallel)
        dense, experts = found[grid.pipeline_rank]
        dense.setdefault(0, {}).setdefault(grid.tensor_rank, []).append(rank)
        experts.setdefault(grid.expert_rank, {}).setdefault(grid.expert_tensor_rank, []).append(rank)
    return found


def _splits(row: Row, shape: ModelShape, shards: Iterable[tuple[Cut, Sequence[int]]]) -> list[Split]:
    """How each of a row's checkpoint tensors is cut, `shards` being the cuts and the ranks that have them."""
    owners: list[dict[tuple[Box, Box], list[int]]] = [{} for _ in row.parts]
    for cut, ranks in shards:
        for part, hf_box, local_box in cut_row(row, shape, cut)[1]:
            owners[part].setdefault((hf_box, local_box), []).extend(ranks)
    return [Split(tuple(Place(tuple(sorted(ranks)), *boxes) for boxes, ranks in found.items())) for found in owners]
