"""Weights that are quantised on their way out of a policy, each rank's part of a checkpoint tensor on its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from megarl.config.quantisation import BLOCK, scale_name
from megarl.ops.fp8 import E4M3, WEIGHT_TILE, Quantised, quantise_weight
from megarl.reshard.boxes import Box
from megarl.reshard.copying import box_view
from megarl.reshard.fp8_map import WeightPart, block_box
from megarl.weights.source import WeightSource


class QuantisedWeights:
    """A source of FP8 values and scales, by the checkpoint's names, made of what another source has for `parts`; it
    has that source's other tensors too.

    It is made for one run of a plan, in which the weights do not change. Of the policy's tensor that was asked for last
    all values are kept, and scales, which are few, of every one: a target's values are asked for before its scales.
    """

    def __init__(self, source: WeightSource, parts: Sequence[WeightPart]) -> None:
        self._source = source
        self._tensor_of = origins(parts)
        self._parts: dict[str, list[WeightPart]] = {}
        for part in parts:
            self._parts.setdefault(part.tensor, []).append(part)
        self._last: tuple[str, Mapping[str, torch.Tensor]] | None = None
        self._scales: dict[str, torch.Tensor] = {}

    def __getitem__(self, name: str, /) -> torch.Tensor:
        tensor = self._tensor_of.get(name)
        if tensor is None:
            return self._source[name]
        if name in self._scales:
            return self._scales[name]
        if self._last is None or self._last[0] != tensor:
            # The old values go before the new ones are made.
            self._last = None
            self._last = tensor, self._quantised(tensor)
        return self._scales[name] if name in self._scales else self._last[1][name]

    def _quantised(self, tensor: str) -> dict[str, torch.Tensor]:
        """The values of all parts of a tensor of the policy; their scales are noted."""
        weight = self._source[tensor]
        found: dict[str, torch.Tensor] = {}
        for part in self._parts[tensor]:
            made = _kept(weight, part) or quantise_weight(_together(weight, part.local_boxes))
            found[part.name], self._scales[scale_name(part.name)] = made.values, made.scales
        return found


def origins(parts: Sequence[WeightPart]) -> dict[str, str]:
    """The policy's tensors that values and scales of `parts` are made of."""
    return {name: part.tensor for part in parts for name in (part.name, scale_name(part.name))}


def _kept(weight: torch.Tensor, part: WeightPart) -> Quantised | None:
    """A part of a parameter that is kept in blocks of FP8, as it is, or None for any other.

    Transformer Engine's Float8BlockwiseQTensor (2.11): values as bytes, scales with columns up to a multiple of 4, by
    blocks of the parameter itself; where the part's blocks lie otherwise there, it is quantised anew.
    """
    values, scales = (getattr(weight, name, None) for name in ("_rowwise_data", "_rowwise_scale_inv"))
    if values is None or scales is None or not getattr(weight, "_is_2D_scaled", False):
        return None
    starts = [start for box in part.local_boxes for start, _ in box]
    lengths = [stop - start for (start, stop), *_ in part.local_boxes[:-1]]
    if any(number % BLOCK for number in (*starts, *lengths)):
        return None
    kept = _together(values, part.local_boxes).view(E4M3)
    return Quantised(kept, _together(scales, [block_box(box) for box in part.local_boxes]), WEIGHT_TILE)


def _together(tensor: torch.Tensor, boxes: Sequence[Box]) -> torch.Tensor:
    """Boxes that follow each other along the rows of what they are parts of, as one."""
    views = [box_view(tensor, box) for box in boxes]
    return views[0] if len(views) == 1 else torch.cat(views)
