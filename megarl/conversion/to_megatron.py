"""Hugging Face to Megatron: each process reads the boxes of its files and writes them, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from megarl.config import splits
from megarl.config.grid import layers_of_chunks
from megarl.config.model_shape import ModelShape, read_model_shape
from megarl.config.sections import ParallelSettings
from megarl.conversion.ranks import Ranks
from megarl.conversion.source import Source, check_finite, check_source, open_source
from megarl.formats import checkpoint_folder, megatron
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
    """Write the checkpoint of Hugging Face's in `source_path` as one of Megatron's, `out`; returns the weights' bytes.

    It loads under any layout; tensors are stored in the shards of `layout` (tensor, pipeline, expert, expert_tensor),
    whose ranks then read no more than they hold. Configuration and tokenizer go to `out`/hf. `dtype` defaults to the
    checkpoint's own. `progress` is told the bytes done and those to do, of this process. All processes call it
    together. Raises `Refusal` for a checkpoint that cannot be converted, a layout that does not cut it, and an output
    that exists.
    """
    shape = read_model_shape(source_path)
    for refusal in splits.policy_refusals(shape, layout):
        raise refusal
    check_absent(out)
    source = open_source(source_path, allow_pickle=allow_pickle)
    written = check_source(source, shape, dtype)
    files = plan_files(shape, layout, written, file_bytes)
    total = sum(piece.elements for pieces in files.values() for piece in pieces) * written.itemsize
    staging = Staging(out, _identity(source, layout, written, file_bytes))
    ranks.once(lambda: staging.begin(total + total // 100))
    mine = ranks.share(list(files))
    own_total = sum(piece.elements for name in mine for piece in files[name]) * written.itemsize
    done = 0
    for name in mine:
        if staging.recorded(name) is None:
            boxes = _boxes(source, files[name], written, lambda size, before=done: progress(before + size, own_total))
            chunks = megatron.write_file(staging.path / name, boxes)
            staging.record(name, [megatron.chunk_to_json(chunk) for chunk in chunks])
        done += sum(piece.elements for piece in files[name]) * written.itemsize
        progress(done, own_total)
    ranks.wait()
    ranks.once(lambda: _finish(staging, files, source_path, shape, written))
    return total


def plan_files(
    shape: ModelShape, layout: ParallelSettings, dtype: torch.dtype, file_bytes: int
) -> dict[str, list[Piece]]:
    """The pieces of each file: of one pipeline stage, tensor-parallel rank and expert-parallel rank, in model order."""
    counts = layers_of_chunks(shape.num_layers, layout)
    stage_of_layer = [stage for stage, count in enumerate(counts) for _ in range(count)]
    groups: dict[tuple[int, int, int], list[Piece]] = {}
    for parameter in stored_parameters(shape, layout.tensor):
        ends = {"first": 0, "last": len(counts) - 1, "layer": stage_of_layer[parameter.layer]}
        expert = 0 if parameter.expert is None else parameter.expert * layout.expert // shape.num_experts
        shards = layout.tensor
        if parameter.expert is not None:
            shards = layout.expert_tensor or layout.tensor
        for rank, box in _shards(parameter, shards):
            groups.setdefault((ends[parameter.stage], rank, expert), []).append(Piece(parameter, box))
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
        data = source.read(name, box)
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


def _identity(source: Source, layout: ParallelSettings, dtype: torch.dtype, file_bytes: int) -> dict[str, Any]:
    """What an interrupted conversion must share with this one to be continued by it."""
    names = sorted({stored.file for stored in source.tensors.values()} | {"config.json"})
    stats = {name: (source.path / name).stat() for name in names}
    return {
        "source": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
        "layout": [layout.tensor, layout.pipeline, layout.expert, layout.expert_tensor],
        "dtype": str(dtype),
        "file_bytes": file_bytes,
    }


def _finish(
    staging: Staging, files: dict[str, list[Piece]], source_path: Path, shape: ModelShape, dtype: torch.dtype
) -> None:
    chunks = [megatron.chunk_from_json(json_chunk) for name in files for json_chunk in staging.recorded(name)]
    megatron.write_index(staging.path, chunks)
    (staging.path / "hf").mkdir(exist_ok=True)
    copy_companions(source_path, staging.path / "hf", DTYPE_NAMES[dtype])
    checkpoint_folder.write_progress(staging.path, shape, {"step": 0, "optimizer": False})
    staging.finish()
