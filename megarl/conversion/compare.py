"""A Hugging Face and a Megatron checkpoint side by side, tensor by tensor."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch

from megarl.config.model_shape import read_model_shape
from megarl.conversion.adapted import Weights
from megarl.conversion.source import open_source
from megarl.formats import checkpoint_folder
from megarl.reshard.boxes import whole
from megarl.reshard.weight_map import hf_problems, hf_tensors


@dataclass
class Kind:
    """Tensors of one name but for the numbers of layer and expert. Checksums are over all of them, in model order."""

    name: str
    shape: tuple[int, ...] = ()
    dtypes: tuple[str, ...] = ()
    count: int = 0
    different: list[str] = field(default_factory=list)
    hashes: tuple[Any, Any] = field(default_factory=lambda: (hashlib.sha256(), hashlib.sha256()))

    @property
    def checksums(self) -> tuple[str, str]:
        """The first 12 digits of SHA-256 of the bytes on both sides."""
        left, right = (digest.hexdigest()[:12] for digest in self.hashes)
        return left, right


@dataclass
class Comparison:
    """`problems`: in sentences, what is missing, superfluous, damaged or of another shape on either side; `kinds`: the
    tensors that both sides have."""

    problems: list[str]
    kinds: list[Kind]

    @property
    def different(self) -> list[str]:
        """The names of tensors whose types or bytes differ."""
        return [name for kind in self.kinds for name in kind.different]


def compare(
    hf: Path,
    megatron: Path,
    *,
    dtype: torch.dtype | None = None,
    allow_pickle: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Comparison:
    """Compare all tensors as they are stored; with `dtype` those of Hugging Face in that type.

    `megatron` is a checkpoint, or a folder whose `latest` names one. Raises `Refusal` where one side is no checkpoint.
    """
    shape = read_model_shape(hf)
    source = open_source(hf, allow_pickle=allow_pickle)
    weights = Weights(checkpoint_folder.newest(megatron), shape)
    expected = hf_tensors(shape)
    problems = [str(refusal) for refusal in hf_problems(shape, source.shapes, str(hf))]
    problems += [str(refusal) for refusal in weights.problems()]
    if not problems:
        weights.check_base(weights.parameters, lambda own: own)
    kinds: dict[str, Kind] = {}
    done, total = 0, sum(map(prod, expected.values()))
    for parameter in weights.parameters:
        names = dict.fromkeys(region.hf_name for region in parameter.tensor.regions)
        fits = all(name in source.tensors and source.tensors[name].shape == expected[name] for name in names)
        if fits and weights.has(parameter):
            for name, ours in weights.read_hf(parameter).items():
                theirs = source.read(name, whole(expected[name]))
                _note(_kind(kinds, name), name, theirs if dtype is None else theirs.to(dtype), ours)
        done += sum(prod(expected[name]) for name in names)
        progress(done, total)
    return Comparison(problems, list(kinds.values()))


def _kind(kinds: dict[str, Kind], name: str) -> Kind:
    pattern = re.sub(r"\.\d+\.", ".*.", name)
    return kinds.setdefault(pattern, Kind(pattern))


def _note(kind: Kind, name: str, left: torch.Tensor, right: torch.Tensor) -> None:
    kind.shape = tuple(left.shape)
    kind.dtypes = tuple(str(side.dtype).removeprefix("torch.") for side in (left, right))
    kind.count += 1
    pair = [side.contiguous().view(torch.uint8).flatten() for side in (left, right)]
    for digest, data in zip(kind.hashes, pair, strict=True):
        digest.update(data.numpy().data)
    if left.dtype != right.dtype or not torch.equal(*pair):
        kind.different.append(name)
