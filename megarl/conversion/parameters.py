"""The model's parameters in one of Megatron's distributed checkpoints."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megarl.config.model_shape import ModelShape
from megarl.errors import Refusal
from megarl.formats import checkpoint_folder
from megarl.formats.huggingface import PRECISIONS
from megarl.formats.megatron import DistributedCheckpoint, is_extra_state, is_scaling
from megarl.reshard.boxes import Box, whole
from megarl.reshard.weight_map import StoredParameter, stored_parameters

#: Keys of a training checkpoint that are no weights.
_OTHER_KEYS = (
    "optimizer.",
    "chained_",
    "rng_state",
    "rerun_state_machine_state",
    "opt_param_scheduler",
    checkpoint_folder.SETS,
)


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
            weight = not key.startswith(_OTHER_KEYS) and not is_extra_state(key) and not is_scaling(key)
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
