"""Megatron's distributed checkpoints ("torch_dist"), read and written box by box, without Megatron and without a group.

A checkpoint is files `*.distcp` of tensors saved one after another, each a box of a larger tensor that has a key, and
`.metadata`, which says what lies where (PyTorch's format, `torch.distributed.checkpoint`). Megatron's are
`metadata.json` and, of all that is no tensor, one object among the tensors; to Megatron-core 0.16 it is `common.pt`.
"""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

from megarl.errors import Refusal
from megarl.reshard.boxes import Box, extents, intersect, numel

#: What Megatron-core 0.19.2 writes as metadata.json.
BACKEND = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}

#: The key under which it keeps what is no tensor: the first and only part of an object, a list with a dictionary.
COMMON = "common_state/shard_0_1"

#: How megarl has Megatron name tensors and lay out the optimizer's state: every layer under its own name; the state in
#: model space, so that it loads under any layout, not only under the one it was saved with.
CONTENT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
    "non_homogeneous_layers": True,
}


def is_extra_state(key: str) -> bool:
    """Whether a key is of what Transformer Engine's layers keep beside their parameters, the history of FP8's scales:
    `_extra_state`, and of a grouped layer's experts past its first `_extra_state1`, `_extra_state2`, ..."""
    return key.rpartition(".")[2].startswith("_extra_state")


def is_scaling(key: str) -> bool:
    """Whether a key is of FP8's delayed scaling: `history` or `factors` of a CPU layer's `scaling`, of experts'
    `scaling0`, `scaling1`, ... in a module (`megarl.policy.fp8_linear`), or of `scaling_fwd` and `scaling_bwd` of
    Transformer Engine's (`megarl.policy.delayed_scaling`)."""
    owner, _, name = key.rpartition(".")
    of_layer = owner.rpartition(".")[2]
    return name in ("history", "factors") and re.fullmatch(r"scaling(\d*|_fwd|_bwd)", of_layer) is not None


class DistributedCheckpoint:
    """A checkpoint to be read. `tensors`: shape and type by key; what is not a tensor is left out.

    Raises `Refusal` where `path` holds no such checkpoint, or its index cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not (self.path / ".metadata").is_file():
            raise Refusal(
                str(self.path),
                "must be a Megatron distributed checkpoint (torch_dist), with .metadata and .distcp files",
                "give a checkpoints/step_... directory, or one that tools/convert_hf_to_megatron.py wrote",
            )
        self._reader = FileSystemReader(self.path)
        self._metadata = _read_metadata(self.path / ".metadata")
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        self._found = {
            key: entry
            for key, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self.tensors = {key: (tuple(entry.size), entry.properties.dtype) for key, entry in self._found.items()}

    def damages(self, keys: Iterable[str]) -> Iterator[Refusal]:
        """Files that are missing or cut short, and tensors of `keys` that lack a part."""
        ends: dict[str, int] = {}
        for place in (self._metadata.storage_data or {}).values():
            ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
        for name, end in ends.items():
            file = self.path / name
            if not file.is_file():
                yield Refusal(str(file), "is named in .metadata and missing", "copy the checkpoint again")
            elif file.stat().st_size < end:
                yield Refusal(str(file), "is shorter than .metadata says", "copy the checkpoint again")
        for key in keys:
            wanted, held = prod(self.tensors[key][0]), sum(map(numel, self.boxes(key)))
            if held != wanted:
                yield Refusal(
                    f"{key} in {self.path}",
                    f"must have all of its {wanted} elements, but {held} are there",
                    "copy the checkpoint again",
                )

    def boxes(self, key: str) -> list[Box]:
        """The boxes in which a tensor is stored."""
        return [
            tuple((start, start + length) for start, length in zip(chunk.offsets, chunk.sizes, strict=True))
            for chunk in self._found[key].chunks
        ]

    def first_not_finite(self) -> str | None:
        """The first tensor, weights before the optimizer's, that holds NaN or infinity. Reads all of them."""
        for key in sorted(self.tensors, key=lambda key: key.startswith("optimizer.")):
            floating = self.tensors[key][1].is_floating_point
            if floating and not all(self.read(key, box).isfinite().all() for box in self.boxes(key)):
                return key
        return None

    def read(self, key: str, box: Box) -> torch.Tensor:
        """One box of one tensor. Of the chunks that the box touches, one at a time is in memory beside the result."""
        entry = self._found[key]
        target = torch.empty(extents(box), dtype=entry.properties.dtype)
        items: list[ReadItem] = []
        for number, place in enumerate(self.boxes(key)):
            common = intersect(place, box)
            if common is None:
                continue
            origin = torch.Size(start for start, _ in place)
            items.append(
                ReadItem(
                    type=LoadItemType.TENSOR,
                    dest_index=MetadataIndex(key),
                    dest_offsets=torch.Size(start - first for (start, _), (first, _) in zip(common, box, strict=True)),
                    storage_index=MetadataIndex(key, origin, number),
                    storage_offsets=torch.Size(start - first for (start, _), first in zip(common, origin, strict=True)),
                    lengths=torch.Size(extents(common)),
                )
            )
        planner = DefaultLoadPlanner()
        planner.set_up_planner({key: target}, self._metadata, is_coordinator=True)
        try:
            self._reader.read_data(LoadPlan(items), planner).wait()
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, AssertionError) as error:
            raise Refusal(
                f"{key} in {self.path}",
                f"cannot be read ({' '.join(str(error).split())[:200]})",
                "copy the checkpoint again",
            ) from None
        return target


class _MetadataUnpickler(pickle.Unpickler):
    """Of all that a pickle may name, only what an index is made of."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "MCoreMetadata":  # Megatron's own, with one more field
            return Metadata
        is_type = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_type or module in _PICKLED_MODULES or (module, name) in _PICKLED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is no part of an index")


#: What an index is made of, beside types.
_PICKLED_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.planner")
_PICKLED = {
    ("torch", "Size"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("collections", "OrderedDict"),
    ("builtins", "set"),
}


def _read_metadata(file: Path) -> Metadata:
    try:
        with open(file, "rb") as stream:
            found = _MetadataUnpickler(stream).load()
    except Exception as error:  # a damaged pickle ends in whatever it stumbles over
        raise Refusal(
            str(file), f"cannot be read ({type(error).__name__}: {error})", "copy the checkpoint again"
        ) from None
    if not isinstance(found, Metadata):
        raise Refusal(str(file), f"must be an index, not a {type(found).__name__}", "copy the checkpoint again")
    return found


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of the tensor `key` of `shape`: where it begins, and where its bytes are in which file."""

    key: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    lengths: tuple[int, ...]
    dtype: str
    file: str
    start: int
    size: int

    @property
    def end(self) -> int:
        return self.start + self.size


def write_file(path: Path, boxes: Iterable[tuple[str, tuple[int, ...], Box, torch.Tensor]]) -> list[Chunk]:
    """Write a `.distcp` file of boxes: key, shape of the whole tensor, box, data. One is in memory at a time."""
    chunks: list[Chunk] = []
    with open(path, "wb") as stream:
        for key, shape, box, data in boxes:
            start = stream.tell()
            # As PyTorch writes them: each by torch.save, and with a storage of its own.
            torch.save(data if data.untyped_storage().nbytes() == data.nbytes else data.clone(), stream)
            dtype = str(data.dtype).removeprefix("torch.")
            offsets = tuple(first for first, _ in box)
            chunks.append(Chunk(key, shape, offsets, extents(box), dtype, path.name, start, stream.tell() - start))
        stream.flush()
        os.fsync(stream.fileno())
    return chunks


def write_index(directory: Path, chunks: Iterable[Chunk]) -> None:
    """Write what makes `.distcp` files a checkpoint of weights alone: .metadata, metadata.json and common.distcp."""
    # Pickle writes an object that it meets again as a reference; of chunks that came other ways others are the same
    # objects. Made anew alike, the same chunks give the same bytes.
    raw = json.loads(json.dumps([chunk_to_json(chunk) for chunk in chunks]))
    common = directory / "common.distcp"
    torch.save([{"content_metadata": CONTENT}], common)
    tensors: dict[str, Any] = {COMMON: BytesStorageMetadata()}
    places = {MetadataIndex(COMMON): _StorageInfo(common.name, 0, common.stat().st_size)}
    for chunk in map(chunk_from_json, raw):
        properties = TensorProperties(dtype=getattr(torch, chunk.dtype))
        entry = tensors.setdefault(chunk.key, TensorStorageMetadata(properties, torch.Size(chunk.shape), []))
        offsets, lengths = torch.Size(chunk.offsets), torch.Size(chunk.lengths)
        entry.chunks.append(ChunkStorageMetadata(offsets, lengths))
        places[MetadataIndex(chunk.key, offsets)] = _StorageInfo(chunk.file, chunk.start, chunk.size)
    metadata = Metadata(tensors, storage_data=places)
    metadata.version = CURRENT_DCP_VERSION
    (directory / "metadata.json").write_text(json.dumps(BACKEND), encoding="utf-8")
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


def chunk_to_json(chunk: Chunk) -> dict[str, Any]:
    """A chunk as JSON."""
    return asdict(chunk)


def chunk_from_json(raw: Mapping[str, Any]) -> Chunk:
    """The inverse of `chunk_to_json`."""
    fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in raw.items()}
    return Chunk(**fields)
