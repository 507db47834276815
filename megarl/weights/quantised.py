"""Weights that are quantised on their way out of a policy, each rank's part of a checkpoint tensor on its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from megarl.config.quantisation import scale_name
from megarl.ops.fp8 import quantise_weight
from megarl.reshard.copying import box_view
from megarl.reshard.quantised import Part
from megarl.weights.source import WeightSource


class QuantisedWeights:
    """A source of FP8 values and scales, by the checkpoint's names, made of what another source has for `parts`; it
    has that source's other tensors too.

    It is made for one run of a plan, in which the weights do not change. Values and scales of a tensor are asked for
    one after another: those of the last tensor are kept.
    """

    def __init__(self, source: WeightSource, parts: Sequence[Part]) -> None:
        self._source = source
        self._tensor_of = {name: part.tensor for part in parts for name in (part.name, scale_name(part.name))}
        self._parts: dict[str, list[Part]] = {}
        for part in parts:
            self._parts.setdefault(part.tensor, []).append(part)
        self._last: tuple[str, Mapping[str, torch.Tensor]] | None = None

    def __getitem__(self, name: str, /) -> torch.Tensor:
        tensor = self._tensor_of.get(name)
        if tensor is None:
            return self._source[name]
        if self._last is None or self._last[0] != tensor:
            self._last = tensor, self._quantised(tensor)
        return self._last[1][name]

    def _quantised(self, tensor: str) -> dict[str, torch.Tensor]:
        """Values and scales of all parts of a tensor of the policy."""
        weight = self._source[tensor]
        found: dict[str, torch.Tensor] = {}
        for part in self._parts[tensor]:
            boxes = [box_view(weight, box) for box in part.local_boxes]
            quantised = quantise_weight(boxes[0] if len(boxes) == 1 else torch.cat(boxes))
            found[part.name] = quantised.values
            found[scale_name(part.name)] = quantised.scales
        return found
