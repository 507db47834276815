"""A Hugging Face and a Megatron checkpoint side by side, tensor by tensor."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch

from megarl.config.model_shape import read_model_shape
from megarl.conversion.source import open_source
from megarl.conversion.to_hf import ParameterReader
from megarl.formats import checkpoint_folder
from megarl.formats.huggingface import DTYPES, Stored
from megarl.formats.megatron import DistributedCheckpoint
from megarl.reshard.boxes import whole
from megarl.reshard.weight_map import check_hf_shapes, hf_tensors


@dataclass
class Kind:
    """Tensors of one name but for the numbers of layer and expert. Checksums are over all of them, in model order."""

    name: str
    shape: tuple[int, ...] = ()
    dtypes: tuple[str, str] = ("", "")
    count: int = 0
    different: list[str] = field(default_factory=list)
    hashes: tuple[Any, Any] = field(default_factory=lambda: (hashlib.sha256(), hashlib.sha256()))

    @property
    def checksums(self) -> tuple[str, str]:
        """The first 12 digits of SHA-256 of the bytes on both sides."""
        left, right = (digest.hexdigest()[:12] for digest in self.hashes)
        return left, right


def compare(
    hf: Path,
    megatron: Path,
    *,
    dtype: torch.dtype | None = None,
    allow_pickle: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Kind]:
    """Compare all tensors, Hugging Face's first, as stored; with `dtype` those of Hugging Face in that type.

    Raises `Refusal` where one side is no whole checkpoint of the model in `hf`.
    """
    shape = read_model_shape(hf)
    source = open_source(hf, allow_pickle=allow_pickle)
    check_hf_shapes(shape, {name: stored.shape for name, stored in source.tensors.items()}, str(hf))
    reader = ParameterReader(DistributedCheckpoint(checkpoint_folder.find(megatron) or megatron), shape)
    reader.check()
    itemsize = reader.dtype.itemsize
    kinds: dict[str, Kind] = {}
    total = sum(prod(dims) for dims in hf_tensors(shape).values()) * itemsize
    done = 0
    for parameter in reader.parameters:
        for name, ours in reader.read_hf(parameter).items():
            stored = source.tensors[name]
            theirs = source.read(name, whole(stored.shape))
            _note(_kind(kinds, name), name, theirs if dtype is None else theirs.to(dtype), ours, stored)
            done += ours.nbytes
        progress(done, total)
    return list(kinds.values())


def _kind(kinds: dict[str, Kind], name: str) -> Kind:
    pattern = re.sub(r"\.\d+\.", ".*.", name)
    return kinds.setdefault(pattern, Kind(pattern))


def _note(kind: Kind, name: str, left: torch.Tensor, right: torch.Tensor, stored: Stored) -> None:
    names = {code: str(dtype).removeprefix("torch.") for code, dtype in DTYPES.items()}
    kind.shape = stored.shape
    kind.dtypes = (names.get(stored.dtype, stored.dtype), str(right.dtype).removeprefix("torch."))
    kind.count += 1
    pair = [side.contiguous().view(torch.uint8).flatten() for side in (left, right)]
    for digest, data in zip(kind.hashes, pair, strict=True):
        digest.update(data.numpy().data)
    if left.dtype != right.dtype or not torch.equal(*pair):
        kind.different.append(name)


def differences(kinds: list[Kind]) -> Iterator[str]:
    """The names of tensors that differ."""
    for kind in kinds:
        yield from kind.different
