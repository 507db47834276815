"""A Hugging Face checkpoint that is about to be converted, checked before anything is written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch

import megarl
from megarl.config.model_shape import ModelShape
from megarl.errors import Refusal
from megarl.formats.companions import stated_dtype
from megarl.formats.huggingface import DTYPE_NAMES, DTYPES, INDEX, PRECISIONS, HfCheckpoint, Stored
from megarl.formats.pickled import PickleCheckpoint
from megarl.reshard.boxes import Box
from megarl.reshard.weight_map import OUTPUT_LAYER, check_hf_shapes, hf_tensors

#: Elements compared at a time where two tensors must be equal.
COMPARED_ELEMENTS = 16 << 20


class Source(Protocol):
    """What a conversion reads: tensors by name, and boxes of them."""

    path: Path

    @property
    def tensors(self) -> Mapping[str, Stored]: ...

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]: ...

    def read(self, name: str, box: Box) -> torch.Tensor: ...


def open_source(path: Path, *, allow_pickle: bool = False) -> Source:
    """Open the weights in `path`. Raises `Refusal` where there are none; pickled ones are read with `allow_pickle`."""
    safetensors = any((path / name).is_file() for name in (INDEX, "model.safetensors"))
    if safetensors or not any(path.glob("pytorch_model*.bin")):
        return HfCheckpoint(path)
    if not allow_pickle:
        raise Refusal(
            f"{path} with pickled weights",
            "is not read unless asked for: a pickle can hold more than weights",
            "convert it to safetensors, or add --allow-pickle, which loads weights alone",
        )
    return PickleCheckpoint(path)


def check_source(source: Source, shape: ModelShape, dtype: torch.dtype | None) -> torch.dtype:
    """Check names, shapes and types of all tensors; returns the type to write: `dtype`, or the checkpoint's own.

    Raises `Refusal` where a tensor is missing, superfluous, or of another shape than config.json says; without `dtype`
    also where one is of another type than the rest, or the type is none that a policy has.
    """
    check_hf_shapes(shape, source.shapes, str(source.path))
    names = hf_tensors(shape)
    if shape.tied_embeddings and OUTPUT_LAYER in source.tensors:
        _check_tied(source, next(iter(names)))
    stated = stated_dtype(json.loads((source.path / "config.json").read_text(encoding="utf-8")))
    own = next((code for code, kind in DTYPES.items() if DTYPE_NAMES[kind] == stated), None)
    own = own or source.tensors[next(iter(names))].dtype
    for name in names:
        found = source.tensors[name].dtype
        if found not in DTYPES or (dtype is None and found != own):
            wanted = f"{own}, as " + ("config.json says" if stated else "the others are")
            if found not in DTYPES:
                wanted = " or ".join(DTYPES)
            raise Refusal(
                f"{name} of type {found} in {source.path}",
                f"must be of type {wanted}",
                "use the checkpoint's original files, or convert all weights by --dtype bf16 or fp32",
            )
    written = dtype or DTYPES[own]
    if written not in PRECISIONS.values():
        raise Refusal(f"{source.path} of type {own}", "is no type that a policy has", "add --dtype bf16 or fp32")
    return written


def _check_tied(source: Source, embedding: str) -> None:
    """An output layer that is stored beside tied embeddings must be a copy of them: it would be lost."""
    rows, width = source.tensors[embedding].shape
    same = source.tensors[OUTPUT_LAYER].shape == (rows, width)
    step = max(1, COMPARED_ELEMENTS // width)
    for start in range(0, rows, step):
        box = ((start, min(start + step, rows)), (0, width))
        same = same and torch.equal(source.read(OUTPUT_LAYER, box), source.read(embedding, box))
    if not same:
        raise Refusal(
            f"{OUTPUT_LAYER} in {source.path}",
            "must equal the embedding, to which config.json ties it (tie_word_embeddings)",
            "set tie_word_embeddings to false in config.json, or remove the tensor",
        )


def check_finite(name: str, data: torch.Tensor, origin: Path) -> None:
    """Raise `Refusal` where a weight is not a number, or infinite."""
    # Neither survives a sum, which takes one pass and no mask. A sum that overflows by itself is looked at again.
    if torch.isfinite(data.sum()):
        return
    bad = int((~torch.isfinite(data)).sum())
    if bad:
        raise Refusal(
            f"{name} in {origin}",
            f"must be finite, but {bad} of its {prod(data.shape)} numbers are NaN or infinite",
            "use a whole copy of the checkpoint",
        )


def identity(source: Path, files: Iterable[str], options: Mapping[str, Any]) -> dict[str, Any]:
    """What an interrupted conversion must share with this one to be continued by it.

    The files' names, sizes and times, and this version of megarl with its options.
    """
    stats = {name: (source / name).stat() for name in sorted({*files, "config.json"}) if (source / name).is_file()}
    return {
        "source": [str(source.resolve()), {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}],
        "version": megarl.__version__,
        **options,
    }
