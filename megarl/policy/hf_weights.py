"""Reads a Hugging Face checkpoint into this rank's shard, slice by slice, and draws random weights.

Only the boxes that the shard needs are read from the safetensors files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from megarl.errors import Refusal
from megarl.policy.policy import Policy
from megarl.reshard.boxes import Box
from megarl.reshard.copying import Reader, box_view, read_local
from megarl.reshard.weight_map import check_hf_shapes, hf_tensors, megatron_tensors


def load_hf_weights(policy: Policy, path: str | Path) -> None:
    """Fill the policy from the safetensors files in `path`.

    Raises `Refusal` where a file is missing or unreadable, or a tensor is missing or of another shape.
    """
    with HfCheckpoint(path) as checkpoint:
        check_hf_shapes(policy.shape, checkpoint.shapes(), str(path))
        _fill(policy, checkpoint.read)


def draw_random_weights(policy: Policy, seed: int) -> None:
    """Fill the policy with normal weights of deviation 0.02 (norms 1, biases 0), the same under every layout."""
    shapes = hf_tensors(policy.shape)
    names = {name: number for number, name in enumerate(shapes)}

    def read(name: str, box: Box) -> torch.Tensor:
        if name.endswith("norm.weight"):
            return torch.ones([stop - start for start, stop in box])
        if name.endswith("bias"):
            return torch.zeros([stop - start for start, stop in box])
        generator = torch.Generator().manual_seed(seed * 1_000_003 + names[name])
        return box_view(torch.randn(shapes[name], generator=generator) * 0.02, box)

    _fill(policy, read)


def _fill(policy: Policy, reader: Reader) -> None:
    tensors = megatron_tensors(policy.shape, policy.config.parallel, policy.grid)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            parameter.copy_(read_local(tensors[name], reader, parameter.dtype))
    policy.weights_changed()


class HfCheckpoint:
    """The safetensors files of a checkpoint directory, opened lazily and read by boxes."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file_of = self._find_files()
        self._open: dict[str, Any] = {}

    def __enter__(self) -> HfCheckpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.clear()

    def _find_files(self) -> dict[str, str]:
        index = self.path / "model.safetensors.index.json"
        if index.is_file():
            return dict(json.loads(index.read_text())["weight_map"])
        single = self.path / "model.safetensors"
        if not single.is_file():
            raise Refusal(
                f"model.path={self.path}",
                "must hold model.safetensors, or an index of several safetensors files",
                "convert the checkpoint to safetensors, or set model.random_init=true",
            )
        with self._opened(single) as file:
            return dict.fromkeys(file.keys(), single.name)

    def _opened(self, file: Path) -> Any:
        try:
            return safe_open(file, framework="pt")
        except Exception as error:  # safetensors raises its own type for a damaged header, OSError for a missing file
            raise Refusal(
                str(file), f"must be a readable safetensors file ({error})", "download or copy it again"
            ) from None

    def _file(self, name: str) -> Any:
        file_name = self._file_of[name]
        if file_name not in self._open:
            self._open[file_name] = self._opened(self.path / file_name)
        return self._open[file_name]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor in the checkpoint."""
        return {name: tuple(self._file(name).get_slice(name).get_shape()) for name in self._file_of}

    def read(self, name: str, box: Box) -> torch.Tensor:
        """One box of one tensor; the rest of the file is not read."""
        return self._file(name).get_slice(name)[tuple(slice(start, stop) for start, stop in box)]
