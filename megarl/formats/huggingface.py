"""Hugging Face checkpoints: safetensors files read by boxes, and written at places known beforehand.

safetensors' own writer takes all tensors of a file at once. Here the files are laid out first, so that tensors go to
their places one by one, in any order and from several processes, and none has to stay in memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from megarl.config.quantisation import VALUES_TYPE, blocks, scale_name, scales_of, scales_refusals
from megarl.errors import Refusal
from megarl.formats.fp8_blocks import read_dequantised
from megarl.ops.fp8 import E4M3, quantise_weight
from megarl.reshard.boxes import Box, whole

#: safetensors' names of the types of weights, and theirs in torch and in config.json.
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
CODES = {dtype: code for code, dtype in DTYPES.items()} | {E4M3: VALUES_TYPE}

#: The types that a policy's weights have, by their names in a run's configuration and on command lines.
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}

INDEX = "model.safetensors.index.json"

#: Bytes of a file at most, as transformers writes them.
FILE_BYTES = 5_000_000_000

#: Bytes of a tensor's entry in a header beside its name, at most.
ENTRY_BYTES = 160

#: Bytes read through one mapping of a file. Pages stay in memory as long as the mapping that they were read through.
MAPPED_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Stored:
    """What a file says of a tensor, without its data."""

    file: str
    shape: tuple[int, ...]
    dtype: str


class HfCheckpoint:
    """The safetensors files of a checkpoint directory, opened when needed and read by boxes.

    Weights in FP8 are read as the numbers that they stand for; `tensors` has neither their type nor their scales.

    Raises `Refusal` where there are none, where one is missing, cut short or damaged, where the index and the files
    disagree, where scales of FP8 weights are missing or of another shape, and, when a weight is read, where they are no
    positive numbers.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._open: dict[str, Any] = {}
        self._read_bytes = 0
        self._stored = stored = self._find_tensors()
        for refusal in scales_refusals({name: (one.dtype, one.shape) for name, one in stored.items()}, str(self.path)):
            raise refusal
        self._scales = scales_of({name: one.dtype for name, one in stored.items()})
        scales = set(self._scales.values())
        self.tensors = {
            # Their own type is no type of weights; bf16 has every number of a block whose scale is a power of two.
            name: replace(one, dtype="BF16") if name in self._scales else one
            for name, one in stored.items()
            if name not in scales
        }

    def __enter__(self) -> HfCheckpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.clear()

    def _find_tensors(self) -> dict[str, Stored]:
        index = self.path / INDEX
        single = (self.path / "model.safetensors").is_file()
        if index.is_file() and single:
            raise Refusal(
                f"{self.path} with model.safetensors and {INDEX}",
                "must hold one of them: libraries differ in which they read",
                "remove the one that is left over from an earlier save",
            )
        if index.is_file():
            named = read_weight_map(index)
        elif single:
            named = {}
        else:
            raise Refusal(
                str(self.path),
                "must hold model.safetensors, or an index of several safetensors files",
                "convert the checkpoint to safetensors, or give another directory",
            )
        tensors: dict[str, Stored] = {}
        for file in sorted(set(named.values())) or ["model.safetensors"]:
            opened = self._file(file)
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                part = opened.get_slice(name)
                tensors[name] = Stored(file, tuple(part.get_shape()), part.get_dtype())
        for name, file in named.items():
            if name not in tensors or tensors[name].file != file:
                raise Refusal(
                    f"{name} in {index}", f"must be in {file}, which does not hold it", "copy the checkpoint again"
                )
        return tensors

    def _file(self, file: str) -> Any:
        if file not in self._open:
            path = self.path / file
            if not path.is_file():
                raise Refusal(str(path), f"is named in {INDEX} and missing", "copy the checkpoint again")
            try:
                self._open[file] = safe_open(path, framework="pt")
            except Exception as error:  # safetensors raises its own type for a damaged header
                raise Refusal(
                    str(path), f"must be a whole safetensors file ({error})", "download or copy it again"
                ) from None
        return self._open[file]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor in the checkpoint."""
        return {name: stored.shape for name, stored in self.tensors.items()}

    def read(self, name: str, box: Box) -> torch.Tensor:
        """One box of one tensor; the rest of the file is not read. Of a weight in FP8 in fp32, not yet rounded."""
        scales = self._scales.get(name)
        if scales is None:
            return self._read(name, box)
        return read_dequantised(name, scales, box, self._read, self.path)

    def _read(self, name: str, box: Box) -> torch.Tensor:
        found = self._file(self._stored[name].file).get_slice(name)[tuple(slice(start, stop) for start, stop in box)]
        self._read_bytes += found.nbytes
        if self._read_bytes > MAPPED_BYTES:
            self._open.clear()
            self._read_bytes = 0
        return found


def read_weight_map(index: Path) -> dict[str, str]:
    """The file of every tensor, from an index. Raises `Refusal` where it cannot be read."""
    try:
        return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (json.JSONDecodeError, KeyError, TypeError, ValueError):
        raise Refusal(str(index), "must be JSON with a weight_map", "copy the checkpoint again") from None


@dataclass(frozen=True, slots=True)
class _Tensor:
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class _Place:
    file: str
    offset: int
    tensor: _Tensor


class HfFiles:
    """The files of a checkpoint to be: `model.safetensors`, or several of at most `file_bytes`, and their index.

    `tensors` are names and shapes in their order; a tensor larger than `file_bytes` has a file of its own. `stem` is
    what the names of files begin with. Those in `quantised` are written in FP8 (`megarl.config.quantisation`), each
    followed by its scales; all others in `dtype`.
    """

    def __init__(
        self,
        tensors: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype,
        file_bytes: int,
        stem: str = "model",
        quantised: Collection[str] = (),
    ) -> None:
        self.dtype, self.quantised = dtype, frozenset(quantised)
        groups: list[dict[str, _Tensor]] = [{}]
        filled = 0
        for name, tensor in self._stored(tensors):
            # With its entry in the header.
            size = tensor.bytes + len(name) + ENTRY_BYTES
            if groups[-1] and filled + size > file_bytes:
                groups.append({})
                filled = 0
            groups[-1][name] = tensor
            filled += size
        self._headers: dict[str, bytes] = {}
        self._sizes: dict[str, int] = {}
        self._places: dict[str, _Place] = {}
        for number, group in enumerate(groups, start=1):
            file = (
                f"{stem}.safetensors" if len(groups) == 1 else f"{stem}-{number:05d}-of-{len(groups):05d}.safetensors"
            )
            self._lay_out(file, group)

    def _stored(self, tensors: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, _Tensor]]:
        for name, shape in tensors.items():
            if name in self.quantised:
                yield name, _Tensor(shape, E4M3)
                yield scale_name(name), _Tensor(tuple(map(blocks, shape)), torch.float32)
            else:
                yield name, _Tensor(shape, self.dtype)

    def _lay_out(self, file: str, tensors: Mapping[str, _Tensor]) -> None:
        """The format: 8 bytes with the header's length, the header (JSON, padded to 8 bytes), the tensors' bytes."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, tensor in tensors.items():
            end = offset + tensor.bytes
            header[name] = {
                "dtype": CODES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._headers[file] = len(text).to_bytes(8, "little") + text
        start = len(self._headers[file])
        self._sizes[file] = start + offset
        for name, tensor in tensors.items():
            self._places[name] = _Place(file, start + header[name]["data_offsets"][0], tensor)

    @property
    def total_bytes(self) -> int:
        """Of all files together."""
        return sum(self._sizes.values())

    def bytes_of(self, name: str) -> int:
        """Of a tensor, with its scales."""
        return sum(self._places[part].tensor.bytes for part in self._parts(name))

    def _parts(self, name: str) -> tuple[str, ...]:
        return (name, scale_name(name)) if name in self.quantised else (name,)

    def complete(self, directory: Path) -> bool:
        """Whether all files are there in their full size, as `create` made them."""
        sizes = {file: (directory / file).stat().st_size for file in self._sizes if (directory / file).is_file()}
        return sizes == self._sizes

    def create(self, directory: Path) -> None:
        """Make the files with their headers and full size, and the index."""
        for file, header in self._headers.items():
            with open(directory / file, "wb") as stream:
                stream.write(header)
                stream.truncate(self._sizes[file])
        if len(self._headers) > 1:
            total = self.total_bytes - sum(map(len, self._headers.values()))
            weight_map = {name: place.file for name, place in self._places.items()}
            content = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (directory / INDEX).write_text(json.dumps(content, indent=1), encoding="utf-8")

    def write(self, directory: Path, name: str, box: Box, data: torch.Tensor) -> None:
        """Put the rows `box` of a tensor, whole in all dimensions but the first, at their place; of one that is
        quantised all rows."""
        if name not in self.quantised:
            self._put(directory, name, box, data)
            return
        place = self._places[name]
        assert box == whole(place.tensor.shape)
        found = quantise_weight(data)
        for part, tensor in zip(self._parts(name), (found.values, found.scales), strict=True):
            self._put(directory, part, whole(tensor.shape), tensor)

    def _put(self, directory: Path, name: str, box: Box, data: torch.Tensor) -> None:
        place = self._places[name]
        dims = place.tensor.shape
        assert all(span == (0, length) for span, length in zip(box[1:], dims[1:], strict=True))
        row_bytes = prod(dims[1:]) * place.tensor.dtype.itemsize
        left = memoryview(data.to(place.tensor.dtype).contiguous().view(torch.uint8).flatten().numpy().data)
        offset = place.offset + box[0][0] * row_bytes
        # Not opened for reading: a network file system would fetch the pages at both ends, and write them back whole.
        file = os.open(directory / place.file, os.O_WRONLY)
        try:
            while left:
                written = os.pwrite(file, left, offset)
                left, offset = left[written:], offset + written
        finally:
            os.close(file)

    def sync(self, directory: Path, names: Iterable[str]) -> None:
        """Put what was written of these tensors on the disk."""
        for file in sorted({self._places[part].file for name in names for part in self._parts(name)}):
            with open(directory / file, "r+b") as stream:
                os.fsync(stream.fileno())
