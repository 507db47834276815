"""Megatron to Hugging Face: each process reads its parameters and writes them at their places in the shared files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from megarl.config.model_shape import read_model_shape
from megarl.conversion.adapted import Weights
from megarl.conversion.ranks import Ranks
from megarl.conversion.source import check_finite, identity
from megarl.formats import checkpoint_folder
from megarl.formats.companions import copy_companions
from megarl.formats.huggingface import DTYPE_NAMES, FILE_BYTES, HfFiles
from megarl.formats.staging import Staging, check_absent
from megarl.reshard.boxes import whole
from megarl.reshard.fp8_map import quantised_weights, quantization_config
from megarl.reshard.weight_map import StoredParameter, hf_tensors

#: Bytes of the parameters after which the work so far is put on the disk and recorded.
PIECE_BYTES = 256 << 20


def convert(
    source_path: Path,
    out: Path,
    ranks: Ranks,
    *,
    hf_config: Path | None = None,
    dtype: torch.dtype | None = None,
    fp8: bool = False,
    file_bytes: int = FILE_BYTES,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Path, int]:
    """Write a distributed checkpoint of Megatron's as one of Hugging Face's, `out`.

    Returns the checkpoint, and the bytes of weights written, by all processes in this attempt. `source_path` is a
    checkpoint, or a folder whose `latest` names one. Configuration and tokenizer come from
    `hf_config`; by default from where the conversion to Megatron, or the run, has noted them. `dtype` defaults to the
    checkpoint's own; `fp8`: linear layers in FP8 with a scale for every block, made of the weights as they are.
    `progress` as in the conversion to Megatron. All processes call it together. Raises `Refusal` for
    a checkpoint that is damaged or of another model, and an output that exists.
    """

    def check() -> tuple[Path, Path, torch.dtype]:
        check_absent(out)
        step = checkpoint_folder.newest(source_path)
        config = hf_config or checkpoint_folder.hf_folder(step)
        return step, config, dtype or open_weights(step, config).dtype

    # One process looks: a run may write its next checkpoint at this moment.
    step, config_path, written = ranks.once(check)
    shape = read_model_shape(config_path)
    weights = Weights(step, shape)
    weights.check_base(ranks.share(weights.parameters), ranks.sum)
    files = HfFiles(hf_tensors(shape), written, file_bytes, quantised=quantised_weights(shape) if fp8 else ())
    sources = {file.name for file in step.iterdir() if file.is_file()}
    options = {
        "config": str(config_path.resolve()),
        "dtype": str(written),
        "fp8": fp8,
        "file_bytes": file_bytes,
    }
    staging = Staging(out, identity(step, sources, options))

    def begin() -> None:
        again = staging.begin(files.total_bytes)
        if again and not files.complete(staging.path):
            staging.forget()
            again = False
        if not again:
            files.create(staging.path)

    ranks.once(begin)
    left = [piece for piece in ranks.share(_pieces(weights.parameters, files)) if not staging.recorded(_name(piece))]
    own_total, done = sum(_bytes(piece, files) for piece in left), 0
    for piece in left:
        for parameter in piece:
            _write(weights, parameter, files, staging.path)
            done += _bytes([parameter], files)
            progress(done, own_total)
        files.sync(staging.path, _names(piece))
        staging.record(_name(piece), True)
    ranks.wait()

    def finish() -> None:
        format_of_weights = quantization_config(shape) if fp8 else None
        copy_companions(config_path, staging.path, DTYPE_NAMES[written], format_of_weights)
        staging.finish()

    ranks.once(finish)
    return step, ranks.sum(done)


def open_weights(checkpoint: Path, hf_config: Path) -> Weights:
    """The weights in a distributed checkpoint of the model in `hf_config`.

    Raises `Refusal` where the checkpoint is damaged, or of another model, or an adapter's base is not there.
    """
    shape = read_model_shape(hf_config)
    if (checkpoint / "progress.json").is_file():
        checkpoint_folder.check_model(checkpoint, checkpoint_folder.read_progress(checkpoint), shape)
    weights = Weights(checkpoint, shape)
    for refusal in weights.problems():
        raise refusal
    return weights


def _write(weights: Weights, parameter: StoredParameter, files: HfFiles, directory: Path) -> None:
    for name, values in weights.read_hf(parameter).items():
        tensor = values if name in files.quantised else values.to(files.dtype)
        check_finite(name, tensor, weights.path)
        files.write(directory, name, whole(tensor.shape), tensor)


def _pieces(parameters: list[StoredParameter], files: HfFiles) -> list[list[StoredParameter]]:
    """Consecutive parameters of about PIECE_BYTES together."""
    pieces: list[list[StoredParameter]] = []
    filled = PIECE_BYTES
    for parameter in parameters:
        if filled >= PIECE_BYTES:
            pieces.append([])
            filled = 0
        pieces[-1].append(parameter)
        filled += _bytes([parameter], files)
    return pieces


def _name(piece: list[StoredParameter]) -> str:
    return piece[0].tensor.name


def _names(parameters: list[StoredParameter]) -> set[str]:
    return {region.hf_name for parameter in parameters for region in parameter.tensor.regions}


def _bytes(parameters: list[StoredParameter], files: HfFiles) -> int:
    return sum(files.bytes_of(name) for name in _names(parameters))
