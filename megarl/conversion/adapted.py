"""A checkpoint's weights as its policy computes with them: where it has an adapter, merged."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from megarl.config.model_shape import ModelShape
from megarl.config.parameter_sets import ADAPTER
from megarl.conversion.parameters import ParameterReader
from megarl.errors import Refusal
from megarl.formats import checkpoint_folder
from megarl.formats.huggingface import PRECISIONS, HfCheckpoint
from megarl.formats.megatron import DistributedCheckpoint
from megarl.ops.bits import sum_of_bits
from megarl.reshard.adapter_map import adapters_of
from megarl.reshard.boxes import Box, Region
from megarl.reshard.weight_map import StoredParameter, hf_problems, hf_tensors, stored_parameters

#: What the names of an adapter's factors begin with, saved alone and beside a base.
ALONE, BESIDE = "adapter.", f"{checkpoint_folder.SETS}{ADAPTER}.adapter."


class Weights:
    """The weights of a checkpoint, region by region.

    Of an adapter that was saved alone the base is what its run began with: `model.weights`, or the model's own folder.
    `base_bits` is the sum of bits that it must have (`megarl.policy.digest.of_frozen`); None where nothing is known.
    """

    def __init__(self, checkpoint: Path, shape: ModelShape) -> None:
        self.path, self._shape = checkpoint, shape
        own, progress = DistributedCheckpoint(checkpoint), _progress(checkpoint)
        facts = progress.get("adapter", progress.get("beside"))
        self.base_bits: str | None = None
        self._base: ParameterReader | HfCheckpoint = ParameterReader(own, shape)
        self._adapter: _Factors | None = None
        self._dtype: torch.dtype | None = None
        if facts is not None:
            alone = "adapter" in progress
            layers = adapters_of(shape, facts["targets"])
            self._adapter = _Factors(own, facts, ALONE if alone else BESIDE, layers)
            if alone:
                self._base, self._dtype = _base_of(checkpoint, progress, shape), PRECISIONS[facts["precision"]]
                self.base_bits = facts["base"]
        self.parameters = stored_parameters(shape)

    def problems(self) -> Iterator[Refusal]:
        """What is missing, superfluous, incomplete, or of another shape."""
        if isinstance(self._base, ParameterReader):
            yield from self._base.problems()
        else:
            yield from hf_problems(self._shape, self._base.shapes, str(self._base.path))
        if self._adapter is not None:
            yield from self._adapter.problems()

    @property
    def base(self) -> Path:
        """Where the base is."""
        return self._base.source.path if isinstance(self._base, ParameterReader) else self._base.path

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights. Raises `Refusal` where they are of several."""
        if self._dtype is not None:
            return self._dtype
        assert isinstance(self._base, ParameterReader)
        return self._base.dtype

    def regions(self, parameter: StoredParameter) -> Iterator[tuple[Region, torch.Tensor]]:
        """Each region of a parameter with its values, merged in fp32 and rounded once to `dtype`."""
        for region, part in self._of_base(parameter):
            yield region, part if self._adapter is None else self._adapter.merged(region.hf_name, region.hf_box, part)

    def check_base(self, parameters: Iterable[StoredParameter], total: Callable[[int], int]) -> None:
        """Raise `Refusal` where an adapter's base is not the one that it was trained beside. `parameters` are this
        process's share of all; `total` adds up the numbers of all processes."""
        if self.base_bits is None:
            return
        found = total(sum(self.bits(parameter) for parameter in parameters))
        if f"{found % (1 << 64):016x}" != self.base_bits:
            raise Refusal(
                str(self.path),
                f"holds an adapter of a base with the digest {self.base_bits}, and {self.base} has another",
                "bring back what it was trained beside, or continue its run with checkpoint.export_hf=true",
            )

    def has(self, parameter: StoredParameter) -> bool:
        """Whether a parameter is there in the shape it should have."""
        if isinstance(self._base, ParameterReader):
            return self._base.has(parameter)
        return all(region.hf_name in self._base.tensors for region in parameter.tensor.regions)

    def read_hf(self, parameter: StoredParameter) -> dict[str, torch.Tensor]:
        """The tensors in Hugging Face's names of which a parameter is made."""
        sizes, found = hf_tensors(self._shape), dict[str, torch.Tensor]()
        for region, part in self.regions(parameter):
            whole = found.setdefault(region.hf_name, torch.empty(sizes[region.hf_name], dtype=part.dtype))
            whole[tuple(slice(*bounds) for bounds in region.hf_box)] = part
        return found

    def bits(self, parameter: StoredParameter) -> int:
        """The sum of bits of a parameter of the base."""
        return sum(sum_of_bits(part.contiguous()) for _, part in self._of_base(parameter))

    def _of_base(self, parameter: StoredParameter) -> Iterator[tuple[Region, torch.Tensor]]:
        if isinstance(self._base, ParameterReader):
            data = self._base.read(parameter)
            for region in parameter.tensor.regions:
                start, stop = region.local_box[0]
                part = data[start:stop]
                yield region, part if self._dtype is None else part.to(self._dtype)
            return
        for region in parameter.tensor.regions:
            yield region, self._base.read(region.hf_name, region.hf_box).to(self._dtype or torch.float32)


class _Factors:
    """The factors of an adapter, under names that begin with `prefix`."""

    def __init__(
        self, source: DistributedCheckpoint, facts: Mapping[str, Any], prefix: str, layers: Collection[str]
    ) -> None:
        self._source, self._prefix, self._layers = source, prefix, layers
        self._scale = facts["alpha"] / facts["rank"]

    def _key(self, hf_name: str, factor: str) -> str:
        return f"{self._prefix}{hf_name.removesuffix('.weight')}.{factor}"

    def problems(self) -> Iterator[Refusal]:
        """What is missing or incomplete."""
        keys = [self._key(f"{layer}.weight", factor) for layer in self._layers for factor in ("lora_A", "lora_B")]
        for key in keys:
            if key not in self._source.tensors:
                rule = "must hold every factor of its adapter"
                yield Refusal(f"{self._source.path} without {key}", rule, "copy the checkpoint again")
        yield from self._source.damages({key for key in self._source.tensors if key.startswith(self._prefix)})

    def merged(self, hf_name: str, box: Box, base: torch.Tensor) -> torch.Tensor:
        """A box of a weight with its change, where it has one."""
        if hf_name.removesuffix(".weight") not in self._layers:
            return base
        a, b = (self._key(hf_name, factor) for factor in ("lora_A", "lora_B"))
        (rank, _), _ = self._source.tensors[a]
        rows, columns = box
        change = self._source.read(b, (rows, (0, rank))).float() @ self._source.read(a, ((0, rank), columns)).float()
        return torch.add(base.float(), change, alpha=self._scale).to(base.dtype)


def _progress(checkpoint: Path) -> dict[str, Any]:
    return checkpoint_folder.read_progress(checkpoint) if (checkpoint / "progress.json").is_file() else {}


def _base_of(checkpoint: Path, progress: Mapping[str, Any], shape: ModelShape) -> ParameterReader | HfCheckpoint:
    """What an adapter was trained beside. Raises `Refusal` where it is not there any more."""
    model = progress.get("config", {}).get("model", {"random_init": False, "weights": None})
    again = "bring it back, or continue the run with checkpoint.export_hf=true, which writes the merged model to hf/"
    if model["random_init"]:
        raise Refusal(str(checkpoint), "holds an adapter of a model that was drawn at random, and not that", again)
    noted = progress.get("weights_path", model["weights"])
    weights = None if noted is None else checkpoint_folder.find(noted)
    if noted is not None and weights is None:
        raise Refusal(str(checkpoint), f"was trained beside {noted}, which is no checkpoint", again)
    # That of another adapter has no base of its own.
    if weights is not None and "adapter" not in _progress(weights):
        return ParameterReader(DistributedCheckpoint(weights), shape)
    return HfCheckpoint(Path(progress["model_path"]))
