"""Megatron to Hugging Face: each process reads its parameters and writes them at their places in the shared files."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import torch

from megarl.config.model_shape import ModelShape, read_model_shape
from megarl.conversion.ranks import Ranks
from megarl.conversion.source import DTYPE_OPTIONS, check_finite
from megarl.errors import Refusal
from megarl.formats import checkpoint_folder
from megarl.formats.companions import copy_companions
from megarl.formats.huggingface import DTYPE_NAMES, HfFiles
from megarl.formats.megatron import DistributedCheckpoint
from megarl.formats.staging import Staging, check_absent
from megarl.reshard.boxes import Box, whole
from megarl.reshard.copying import copy_box
from megarl.reshard.weight_map import StoredParameter, hf_tensors, stored_parameters

#: Bytes of a file of the output at most, as transformers writes them.
FILE_BYTES = 5_000_000_000
#: Bytes of the parameters after which the work so far is put on the disk and recorded.
PIECE_BYTES = 256 << 20

#: Keys of a training checkpoint that are no weights.
_OTHER_KEYS = ("optimizer.", "rng_state", "rerun_state_machine_state", "opt_param_scheduler")


def convert(
    source_path: Path,
    out: Path,
    ranks: Ranks,
    *,
    hf_config: Path | None = None,
    dtype: torch.dtype | None = None,
    file_bytes: int = FILE_BYTES,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Write a distributed checkpoint of Megatron's as one of Hugging Face's, `out`; returns the weights' bytes.

    `source_path` is a checkpoint, or a folder whose `latest` names one. Configuration and tokenizer come from
    `hf_config`; by default from where the conversion to Megatron, or the run, has noted them. `dtype` defaults to the
    checkpoint's own. `progress` as in the conversion to Megatron. All processes call it together. Raises `Refusal` for
    a checkpoint that is damaged or of another model, and an output that exists.
    """
    source_path = checkpoint_folder.find(source_path) or source_path
    config_path = hf_config or checkpoint_folder.hf_folder(source_path)
    check_absent(out)
    shape = read_model_shape(config_path)
    source = DistributedCheckpoint(source_path)
    reader = ParameterReader(source, shape)
    reader.check()
    written = dtype or reader.dtype
    files = HfFiles(hf_tensors(shape), written, file_bytes)
    pieces = _pieces(reader.parameters, written)
    staging = Staging(out, _identity(source_path, config_path, written, file_bytes))

    def begin() -> None:
        staging.begin(files.total_bytes)
        files.create(staging.path)

    ranks.once(begin)
    mine = ranks.share(pieces)
    own_total = sum(_bytes(piece, written) for piece in mine)
    done = 0
    for piece in mine:
        name = piece[0].tensor.name
        if staging.recorded(name) is None:
            for parameter in piece:
                _write(reader, parameter, files, staging.path)
                done += _bytes([parameter], written)
                progress(done, own_total)
            files.sync(staging.path, [region.hf_name for parameter in piece for region in parameter.tensor.regions])
            staging.record(name, True)
        else:
            done += _bytes(piece, written)
            progress(done, own_total)
    ranks.wait()

    def finish() -> None:
        copy_companions(config_path, staging.path, DTYPE_NAMES[written])
        staging.finish()

    ranks.once(finish)
    return sum(prod(dims) for dims in hf_tensors(shape).values()) * written.itemsize


class ParameterReader:
    """The model's parameters in a distributed checkpoint, whether layers have names of their own or are stacked."""

    def __init__(self, source: DistributedCheckpoint, shape: ModelShape) -> None:
        self.source = source
        self._shape = shape
        self.parameters = stored_parameters(shape)

    def _place(self, parameter: StoredParameter) -> tuple[str, tuple[int, ...]]:
        """Key and leading index of a parameter."""
        if parameter.key not in self.source.tensors and parameter.stacked is not None:
            key, layer = parameter.stacked
            if key in self.source.tensors:
                return key, (layer, *parameter.index)
        return parameter.key, parameter.index

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights. Raises `Refusal` where they are of several."""
        first = self._place(self.parameters[0])[0]
        expected = self.source.tensors[first][1]
        for parameter in self.parameters:
            key = self._place(parameter)[0]
            found = self.source.tensors[key][1]
            if found != expected:
                raise Refusal(
                    f"{key} of type {found} in {self.source.path}",
                    f"must be of type {expected}, as {first} is",
                    "convert all weights to one type by --dtype bf16 or fp32",
                )
        if expected not in DTYPE_OPTIONS.values():
            raise Refusal(f"{self.source.path} of type {expected}", "is no type of weights", "add --dtype bf16 or fp32")
        return expected

    def check(self) -> None:
        """Raise `Refusal` where a parameter is missing, superfluous, incomplete, or of another shape."""
        origin = self.source.path
        known: set[str] = set()
        for parameter in self.parameters:
            key, index = self._place(parameter)
            if key not in self.source.tensors:
                raise Refusal(
                    f"{origin} without {key}", "must hold every tensor of the model", "give the model's own config.json"
                )
            lengths = self.source.tensors[key][0]
            padded = parameter.key.startswith("embedding.") or parameter.key.startswith("output_layer.")
            wanted = parameter.shape if index == parameter.index else (self._shape.num_layers, *parameter.shape)
            fits = lengths == wanted
            if padded:
                # The vocabulary's padding depends on the layout that wrote it.
                fits = lengths[0] >= self._shape.vocab_size and lengths[1:] == wanted[1:]
            if not fits:
                raise Refusal(
                    f"{key} of shape {lengths} in {origin}",
                    f"must have shape {wanted}{', padding aside,' if padded else ''} by config.json",
                    "use the config.json that belongs to these weights",
                )
            known.add(key)
        for key in self.source.tensors:
            weight = not key.startswith(_OTHER_KEYS) and "_extra_state" not in key
            if weight and key not in known:
                raise Refusal(
                    f"{key} in {origin}",
                    f"is no tensor of a {self._shape.family} model with this config.json",
                    "use the config.json that belongs to these weights",
                )
        self.source.check_whole(known)

    def read(self, parameter: StoredParameter) -> torch.Tensor:
        """A parameter without the padding of the vocabulary."""
        key, index = self._place(parameter)
        box: Box = whole(parameter.tensor.shape)
        if parameter.stage != "layer":
            rows = max((region.local_box[0][1] for region in parameter.tensor.regions), default=0)
            box = ((0, rows), *box[1:])
        leading = tuple((number, number + 1) for number in index)
        data = self.source.read(key, leading + box)
        return data.reshape(data.shape[len(leading) :])

    def read_hf(self, parameter: StoredParameter) -> dict[str, torch.Tensor]:
        """The checkpoint's tensors of which a parameter is made."""
        data = self.read(parameter)
        sizes = hf_tensors(self._shape)
        names = dict.fromkeys(region.hf_name for region in parameter.tensor.regions)
        found = {name: torch.empty(sizes[name], dtype=data.dtype) for name in names}
        for region in parameter.tensor.regions:
            copy_box(found[region.hf_name], region.hf_box, data, region.local_box)
        return found


def _write(reader: ParameterReader, parameter: StoredParameter, files: HfFiles, directory: Path) -> None:
    data = reader.read(parameter)
    for region in parameter.tensor.regions:
        start, stop = region.local_box[0]
        part = data[start:stop]
        check_finite(region.hf_name, part, reader.source.path)
        files.write(directory, region.hf_name, region.hf_box, part)


def _pieces(parameters: list[StoredParameter], dtype: torch.dtype) -> list[list[StoredParameter]]:
    """Consecutive parameters of about PIECE_BYTES together."""
    pieces: list[list[StoredParameter]] = []
    filled = PIECE_BYTES
    for parameter in parameters:
        if filled >= PIECE_BYTES:
            pieces.append([])
            filled = 0
        pieces[-1].append(parameter)
        filled += _bytes([parameter], dtype)
    return pieces


def _bytes(parameters: list[StoredParameter], dtype: torch.dtype) -> int:
    return sum(prod(parameter.tensor.shape) for parameter in parameters) * dtype.itemsize


def _identity(source: Path, config: Path, dtype: torch.dtype, file_bytes: int) -> dict[str, Any]:
    stats = {path.name: path.stat() for path in (*sorted(source.glob("*.distcp")), config / "config.json")}
    return {
        "source": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
        "dtype": str(dtype),
        "file_bytes": file_bytes,
    }
