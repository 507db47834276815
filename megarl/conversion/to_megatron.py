"""Hugging Face to Megatron: each process reads the boxes of its files and writes them, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from megarl.config import splits
from megarl.config.model_shape import ModelShape, read_model_shape
from megarl.config.sections import ParallelSettings
from megarl.conversion.ranks import Ranks
from megarl.conversion.source import Source, check_finite, check_source, identity, open_source
from megarl.errors import Refusal
from megarl.formats import checkpoint_folder, checksums, megatron
from megarl.formats.companions import copy_companions
from megarl.formats.huggingface import DTYPE_NAMES
from megarl.formats.staging import Staging, check_absent
from megarl.reshard.boxes import Box, extents, restrict, whole
from megarl.reshard.copying import read_local
from megarl.reshard.weight_map import StoredParameter, stored_parameters

#: Bytes of a file of the output, about: what the processes share the work by.
FILE_BYTES = 512 << 20


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a parameter, in the parameter's own coordinates."""

    parameter: StoredParameter
    box: Box

    @property
    def elements(self) -> int:
        return prod(extents(self.box))


def convert(
    source_path: Path,
    out: Path,
    layout: ParallelSettings,
    ranks: Ranks,
    *,
    dtype: torch.dtype | None = None,
    allow_pickle: bool = False,
    file_bytes: int = FILE_BYTES,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Write the checkpoint of Hugging Face's in `source_path` as one of Megatron's, `out`; returns the bytes of
    weights written, by all processes in this attempt.

    It loads under any layout; tensors are stored in the shards of `layout` (tensor, pipeline, expert, expert_tensor),
    whose ranks then read no more than they hold. Configuration and tokenizer go to `out`/hf. `dtype` defaults to the
    checkpoint's own. `progress` is told the bytes done and those to do, of this process. All processes call it
    together. Raises `Refusal` for a checkpoint that cannot be converted, a layout that does not cut it, and an output
    that exists.
    """

    def check() -> torch.dtype:
        shape = read_model_shape(source_path)
        for refusal in splits.policy_refusals(shape, layout):
            raise refusal
        if layout.pipeline > shape.num_layers:
            rule = f"must be at most the model's {shape.num_layers} layers"
            raise Refusal(f"parallel.pipeline={layout.pipeline}", rule, "use fewer stages")
        check_absent(out)
        return check_source(open_source(source_path, allow_pickle=allow_pickle), shape, dtype)

    written = ranks.once(check)
    shape, source = read_model_shape(source_path), open_source(source_path, allow_pickle=allow_pickle)
    files = plan_files(shape, layout, written, file_bytes)
    total = sum(map(_elements, files.values())) * written.itemsize
    options = {"layout": str(layout), "dtype": str(written), "file_bytes": file_bytes}
    staging = Staging(out, identity(source_path, {stored.file for stored in source.tensors.values()}, options))
    ranks.once(lambda: staging.begin(total + total // 100))
    mine = ranks.share(list(files))
    chunks = {name: found for name in mine if (found := _recorded(staging, name))}
    left = [name for name in mine if name not in chunks]
    own_total, done = sum(_elements(files[name]) for name in left) * written.itemsize, 0
    for name in left:
        boxes = _boxes(source, files[name], written, lambda size, before=done: progress(before + size, own_total))
        chunks[name] = megatron.write_file(staging.path / name, boxes)
        staging.record(name, [megatron.chunk_to_json(chunk) for chunk in chunks[name]])
        done += _elements(files[name]) * written.itemsize
    gathered = ranks.gather(chunks)
    # By their writers: another host may see an older state of a file.
    sums = ranks.gather({name: checksums.measure(staging.path / name) for name in mine})

    def finish() -> None:
        found = {name: made for part in gathered for name, made in part.items()}
        megatron.write_index(staging.path, [chunk for name in files for chunk in found[name]])
        (staging.path / "hf").mkdir(exist_ok=True)
        copy_companions(source_path, staging.path / "hf", DTYPE_NAMES[written])
        facts = {"step": 0, "optimizer": False}
        measured = {name: stored for part in sums for name, stored in part.items()}
        checkpoint_folder.write_progress(staging.path, shape, facts, measured)
        staging.finish()

    ranks.once(finish)
    return ranks.sum(done)


def _elements(pieces: list[Piece]) -> int:
    return sum(piece.elements for piece in pieces)


def _recorded(staging: Staging, name: str) -> list[megatron.Chunk] | None:
    """The chunks of a file that an earlier attempt finished, and that is still there."""
    raw = staging.recorded(name)
    if not raw:
        return None
    chunks = [megatron.chunk_from_json(one) for one in raw]
    file = staging.path / name
    return chunks if file.is_file() and file.stat().st_size == chunks[-1].end else None


def plan_files(
    shape: ModelShape, layout: ParallelSettings, dtype: torch.dtype, file_bytes: int
) -> dict[str, list[Piece]]:
    """The pieces of each file: of one pipeline stage, tensor-parallel rank and expert-parallel rank, in model order.

    Layers that do not divide by the stages are shared out as evenly as can be: a run may cut them otherwise, as every
    layer is stored by itself.
    """
    groups: dict[tuple[int, int, int], list[Piece]] = {}
    for parameter in stored_parameters(shape, layout.tensor):
        stage_of_layer = parameter.layer * layout.pipeline // shape.num_layers
        stage = {"first": 0, "layer": stage_of_layer, "last": layout.pipeline - 1}[parameter.stage]
        expert = 0 if parameter.expert is None else parameter.expert * layout.expert // shape.num_experts
        shards = layout.tensor
        if parameter.expert is not None:
            shards = layout.expert_tensor or layout.tensor
        for rank, box in _shards(parameter, shards):
            groups.setdefault((stage, rank, expert), []).append(Piece(parameter, box))
    files: list[list[Piece]] = []
    for _, pieces in sorted(groups.items()):
        filled = file_bytes
        for piece in pieces:
            size = piece.elements * dtype.itemsize
            if filled + size > file_bytes:
                files.append([])
                filled = 0
            files[-1].append(piece)
            filled += size
    return {f"__{number}_0.distcp": pieces for number, pieces in enumerate(files)}


def _shards(parameter: StoredParameter, ranks: int) -> Iterator[tuple[int, Box]]:
    """The boxes of a parameter that tensor-parallel ranks hold, with the first rank that holds them."""
    dims = parameter.tensor.shape
    if parameter.cut is None:
        yield 0, whole(dims)
        return
    share = dims[parameter.cut] // parameter.halves // ranks
    for half in range(parameter.halves):
        for rank in range(ranks):
            start = (half * ranks + rank) * share
            box = list(whole(dims))
            box[parameter.cut] = (start, start + share)
            yield rank, tuple(box)


def _boxes(
    source: Source, pieces: list[Piece], dtype: torch.dtype, progress: Callable[[int], None]
) -> Iterator[tuple[str, tuple[int, ...], Box, torch.Tensor]]:
    """The pieces' data, each read when it is asked for."""

    def read(name: str, box: Box) -> torch.Tensor:
        data = source.read(name, box).to(dtype)
        check_finite(name, data, source.path)
        return data

    done = 0
    for piece in pieces:
        parameter = piece.parameter
        data = read_local(restrict(parameter.tensor, piece.box), read, dtype)
        leading = tuple((index, index + 1) for index in parameter.index)
        yield parameter.key, parameter.shape, leading + piece.box, data.reshape((1,) * len(leading) + data.shape)
        done += data.nbytes
        progress(done)
