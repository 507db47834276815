"""Megatron to Hugging Face: each process reads its parameters and writes them at their places in the shared files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path

import torch

from megarl.config.model_shape import ModelShape, read_model_shape
from megarl.conversion.ranks import Ranks
from megarl.conversion.source import check_finite, identity
from megarl.errors import Refusal
from megarl.formats import checkpoint_folder
from megarl.formats.companions import copy_companions
from megarl.formats.huggingface import DTYPE_NAMES, FILE_BYTES, PRECISIONS, HfFiles
from megarl.formats.megatron import DistributedCheckpoint
from megarl.formats.staging import Staging, check_absent
from megarl.reshard.boxes import Box, whole
from megarl.reshard.copying import copy_box
from megarl.reshard.weight_map import StoredParameter, hf_tensors, stored_parameters

#: Bytes of the parameters after which the work so far is put on the disk and recorded.
PIECE_BYTES = 256 << 20

#: Keys of a training checkpoint that are no weights.
_OTHER_KEYS = (
    "optimizer.",
    "chained_",
    "rng_state",
    "rerun_state_machine_state",
    "opt_param_scheduler",
    checkpoint_folder.SETS,
)


def convert(
    source_path: Path,
    out: Path,
    ranks: Ranks,
    *,
    hf_config: Path | None = None,
    dtype: torch.dtype | None = None,
    file_bytes: int = FILE_BYTES,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Path, int]:
    """Write a distributed checkpoint of Megatron's as one of Hugging Face's, `out`.

    Returns the checkpoint, and the bytes of weights written, by all processes in this attempt. `source_path` is a
    checkpoint, or a folder whose `latest` names one. Configuration and tokenizer come from
    `hf_config`; by default from where the conversion to Megatron, or the run, has noted them. `dtype` defaults to the
    checkpoint's own. `progress` as in the conversion to Megatron. All processes call it together. Raises `Refusal` for
    a checkpoint that is damaged or of another model, and an output that exists.
    """

    def check() -> tuple[Path, Path, torch.dtype]:
        check_absent(out)
        step = checkpoint_folder.newest(source_path)
        config = hf_config or checkpoint_folder.hf_folder(step)
        reader = open_parameters(step, config)
        return step, config, dtype or reader.dtype

    # One process looks: a run may write its next checkpoint at this moment.
    step, config_path, written = ranks.once(check)
    shape = read_model_shape(config_path)
    reader = ParameterReader(DistributedCheckpoint(step), shape)
    files = HfFiles(hf_tensors(shape), written, file_bytes)
    sources = {file.name for file in step.iterdir() if file.is_file()}
    options = {"config": str(config_path.resolve()), "dtype": str(written), "file_bytes": file_bytes}
    staging = Staging(out, identity(step, sources, options))

    def begin() -> None:
        again = staging.begin(files.total_bytes)
        if again and not files.complete(staging.path):
            staging.forget()
            again = False
        if not again:
            files.create(staging.path)

    ranks.once(begin)
    left = [piece for piece in ranks.share(_pieces(reader.parameters, written)) if not staging.recorded(_name(piece))]
    own_total, done = sum(_bytes(piece, written) for piece in left), 0
    for piece in left:
        for parameter in piece:
            _write(reader, parameter, files, staging.path)
            done += _bytes([parameter], written)
            progress(done, own_total)
        files.sync(staging.path, [region.hf_name for parameter in piece for region in parameter.tensor.regions])
        staging.record(_name(piece), True)
    ranks.wait()

    def finish() -> None:
        copy_companions(config_path, staging.path, DTYPE_NAMES[written])
        staging.finish()

    ranks.once(finish)
    return step, ranks.sum(done)


def open_parameters(checkpoint: Path, hf_config: Path) -> ParameterReader:
    """The parameters in a distributed checkpoint of the model in `hf_config`.

    Raises `Refusal` where the checkpoint is damaged, or of another model.
    """
    shape = read_model_shape(hf_config)
    if (checkpoint / "progress.json").is_file():
        progress = checkpoint_folder.read_progress(checkpoint)
        checkpoint_folder.check_model(checkpoint, progress, shape)
        if "adapter" in progress:
            raise Refusal(
                str(checkpoint),
                "holds an adapter alone, without the weights that it was trained beside",
                "continue its run with checkpoint.export_hf=true, which writes the merged model to hf/",
            )
    reader = ParameterReader(DistributedCheckpoint(checkpoint), shape)
    for refusal in reader.problems():
        raise refusal
    return reader


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
        if expected not in PRECISIONS.values():
            raise Refusal(f"{self.source.path} of type {expected}", "is no type of weights", "add --dtype bf16 or fp32")
        return expected

    @staticmethod
    def _padded(parameter: StoredParameter) -> bool:
        """Whether a parameter has the vocabulary's rows, whose padding depends on the layout that wrote it."""
        return parameter.stage != "layer" and parameter.cut is not None

    def _fits_padded(self, found: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
        return found[0] >= self._shape.vocab_size and found[1:] == wanted[1:]

    def problems(self) -> Iterator[Refusal]:
        """What is missing, superfluous, incomplete, or of another shape."""
        origin = self.source.path
        known: set[str] = set()
        for parameter in self.parameters:
            key, index = self._place(parameter)
            if key in known:
                continue
            known.add(key)
            if key not in self.source.tensors:
                rule, fix = "must hold every tensor of the model", "give the model's own config.json"
                yield Refusal(f"{origin} without {key}", rule, fix)
                continue
            lengths = self.source.tensors[key][0]
            padded = self._padded(parameter)
            wanted = parameter.shape if index == parameter.index else (self._shape.num_layers, *parameter.shape)
            if lengths != wanted and not (padded and self._fits_padded(lengths, wanted)):
                yield Refusal(
                    f"{key} of shape {lengths} in {origin}",
                    f"must have shape {wanted}{', padding aside,' if padded else ''} by config.json",
                    "use the config.json that belongs to these weights",
                )
        for key in self.source.tensors:
            weight = not key.startswith(_OTHER_KEYS) and "_extra_state" not in key
            if weight and key not in known:
                yield Refusal(
                    f"{key} in {origin}",
                    f"is no tensor of a {self._shape.family} model with this config.json",
                    "use the config.json that belongs to these weights",
                )
        yield from self.source.damages(known & set(self.source.tensors))

    def has(self, parameter: StoredParameter) -> bool:
        """Whether a parameter is there in the shape it should have."""
        key, index = self._place(parameter)
        if key not in self.source.tensors:
            return False
        found, wanted = self.source.tensors[key][0][len(index) :], parameter.tensor.shape
        return found == wanted or (self._padded(parameter) and self._fits_padded(found, wanted))

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
        part = data[start:stop].to(files.dtype)
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


def _name(piece: list[StoredParameter]) -> str:
    return piece[0].tensor.name


def _bytes(parameters: list[StoredParameter], dtype: torch.dtype) -> int:
    return sum(prod(parameter.tensor.shape) for parameter in parameters) * dtype.itemsize
