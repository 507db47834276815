"""Hugging Face checkpoints of the older kind: pickled `pytorch_model*.bin` files, of which weights alone are loaded."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError

import torch

from megarl.errors import Refusal
from megarl.formats.huggingface import CODES, Stored, read_weight_map
from megarl.reshard.boxes import Box


class PickleCheckpoint:
    """The pickled files of a checkpoint directory, one of them mapped into memory at a time.

    Raises `Refusal` where a file is missing or holds anything but tensors.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._loaded: tuple[str, dict[str, torch.Tensor]] = ("", {})
        self.tensors = {
            name: Stored(file, tuple(tensor.shape), CODES.get(tensor.dtype, str(tensor.dtype)))
            for file in self._files()
            for name, tensor in self._load(file).items()
        }

    def _files(self) -> list[str]:
        index = self.path / "pytorch_model.bin.index.json"
        if index.is_file():
            return sorted(set(read_weight_map(index).values()))
        return ["pytorch_model.bin"]

    def _load(self, file: str) -> dict[str, torch.Tensor]:
        if self._loaded[0] != file:
            path = self.path / file
            try:
                loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            except (OSError, RuntimeError, UnpicklingError, EOFError) as error:
                raise Refusal(
                    str(path),
                    f"must be a whole file of pickled weights ({' '.join(str(error).split())[:200]})",
                    "copy it again, or convert the checkpoint to safetensors",
                ) from None
            strange = (
                loaded if not isinstance(loaded, dict) else [k for k, v in loaded.items() if not torch.is_tensor(v)]
            )
            if strange:
                what = f"not {strange[:3]}" if isinstance(loaded, dict) else f"not a {type(loaded).__name__}"
                raise Refusal(str(path), f"must be a record of tensors, {what}", "save the model's state_dict alone")
            self._loaded = (file, loaded)
        return self._loaded[1]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor in the checkpoint."""
        return {name: stored.shape for name, stored in self.tensors.items()}

    def read(self, name: str, box: Box) -> torch.Tensor:
        """A copy of one box of one tensor."""
        tensor = self._load(self.tensors[name].file)[name]
        return tensor[tuple(slice(start, stop) for start, stop in box)].clone()
