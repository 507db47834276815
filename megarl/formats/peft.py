"""Adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`. Torch-free.

PEFT names a layer's factors by its module in the Hugging Face model. Since transformers 5 a mixture's experts are no
modules but two stacked parameters, down and gate with up, each of which has one pair of factors for all experts
(`target_parameters`): A expert by expert, B's columns of all experts' first ranks first. Gate and up have an adapter
each, so their stacked one has twice the rank, and B two blocks of it; where PEFT made one of the plain rank, gate and
up begin with the same A. Files of older versions, with every expert's own names, are read too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megarl.config.adapters import OUTPUT_LAYER, AdapterSettings, is_target
from megarl.config.files import tensors_of
from megarl.config.model_shape import ModelShape
from megarl.errors import Refusal
from megarl.reshard.adapter_map import adapters_of

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
#: What stands before the number of an expert in the name of its linear layer.
EXPERTS = ".experts."
#: The linear layers of an expert by what they are, and by gate or up the down beside it.
_DOWN, _UP = frozenset({"down_proj", "w2"}), frozenset({"up_proj", "w3"})
_DOWN_OF = {"gate_proj": "down_proj", "up_proj": "down_proj", "w1": "w2", "w3": "w2"}
_AGAIN = "save the adapter again with PEFT, or copy its folder again"

#: What PEFT's configuration says of where an adapter came from and which layers have it, which the tensors show.
_OF_ORIGIN = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
        "exclude_modules", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform",
        "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "peft_type",
        "peft_version", "qalora_group_size", "r", "revision", "runtime_config", "target_modules", "target_parameters",
        "task_type",
    }
)  # fmt: skip
#: Ways to begin that leave the base's weights as they are; the others (pissa, olora, ...) change them.
_BEGINNINGS = (None, True, False, "gaussian", "eva", "orthogonal")


class Part(NamedTuple):
    """Where a layer's factor is: the tensor's name, and the rows and columns of it, by start, stop and step."""

    tensor: str
    rows: slice
    columns: slice


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """An adapter on disk: where each layer's A and B are. `zeros`: what must be zero of B beside an expert's own."""

    folder: Path
    parts: Mapping[str, tuple[Part, Part]]
    zeros: Mapping[str, Part]
    head: str | None
    """A copy of the output layer's weight, which PEFT adds to its adapter."""


def tensor_name(layer: str, factor: str) -> str:
    """PEFT's name of a layer's `lora_A` or `lora_B`."""
    return f"{_PREFIX}{layer}.{factor}.weight"


def open_adapter(folder: Path, settings: AdapterSettings, shape: ModelShape) -> AdapterFiles:
    """The adapter in `folder`, which must be one of this model and these settings.

    Raises `Refusal` for files that are missing or damaged, for kinds of LoRA that are not those of megarl, and for an
    adapter of another base, rank or scale, or of other layers than `adapter.targets`.
    """
    config = _read_config(folder / CONFIG, settings)
    shapes = _shapes(folder / TENSORS)
    doubled = bool(config.get("rank_pattern"))
    wanted = adapters_of(shape, settings.targets)
    parts: dict[str, tuple[Part, Part]] = {}
    zeros: dict[str, Part] = {}
    for layer, (outputs, inputs) in wanted.items():
        found = _alone(layer, outputs, inputs, settings)
        if EXPERTS in layer and found.a.tensor not in shapes:
            found = _stacked(layer, outputs, inputs, shape, settings, doubled=doubled)
            if found.beside is not None:
                zeros[layer] = found.beside
        parts[layer] = found.a, found.b
        for part, dims in ((found.a, found.a_dims), (found.b, found.b_dims)):
            _check_tensor(part.tensor, dims, shapes, folder / TENSORS)
    used = {part.tensor for both in parts.values() for part in both}
    head = f"{_PREFIX}{OUTPUT_LAYER}.base_layer.weight"
    for name in sorted(shapes.keys() - used - ({head} if OUTPUT_LAYER in wanted else set())):
        raise Refusal(
            f"{name} in {folder / TENSORS}",
            "is of no layer in adapter.targets",
            "add its layer to adapter.targets, or use the adapter of this base model",
        )
    return AdapterFiles(folder, parts, zeros, head if head in shapes else None)


class _Place(NamedTuple):
    """Where a layer's factors are, and the whole tensors' sizes. `beside`: what else is in B's rows, and must be 0."""

    a: Part
    a_dims: tuple[int, int]
    b: Part
    b_dims: tuple[int, int]
    beside: Part | None = None


def _alone(layer: str, outputs: int, inputs: int, settings: AdapterSettings) -> _Place:
    a, b = (Part(tensor_name(layer, factor), slice(None), slice(None)) for factor in ("lora_A", "lora_B"))
    return _Place(a, (settings.rank, inputs), b, (outputs, settings.rank))


def _stacked(
    layer: str, outputs: int, inputs: int, shape: ModelShape, settings: AdapterSettings, *, doubled: bool
) -> _Place:
    """Of an expert in the factors of all experts; with `doubled` gate and up have blocks of their own."""
    block, _, after = layer.partition(EXPERTS)
    number, _, leaf = after.partition(".")
    expert, rank, experts = int(number), settings.rank, shape.num_experts
    module = f"{block.rpartition('.')[0]}.mlp.experts"
    fused, half = leaf not in _DOWN, 1 if leaf in _UP else 0
    if fused and is_target(f"{block}{EXPERTS}{number}.{_DOWN_OF[leaf]}", settings.targets):
        # The parameter that PEFT wraps first is inside.
        module += ".base_layer"
    a, b = (tensor_name(module, factor) for factor in ("lora_A", "lora_B"))
    blocks, place = (2, half) if fused and doubled else (1, 0)
    first = (expert * blocks + place) * rank
    rows = slice(half * outputs, (half + 1) * outputs) if fused else slice(None)
    columns = [slice(n * rank * experts + expert, (n + 1) * rank * experts, experts) for n in range(blocks)]
    return _Place(
        Part(a, slice(first, first + rank), slice(None)),
        (experts * blocks * rank, inputs),
        Part(b, rows, columns[place]),
        (outputs * (2 if fused else 1), experts * blocks * rank),
        Part(b, rows, columns[1 - place]) if blocks == 2 else None,
    )


def written(shape: ModelShape, settings: AdapterSettings) -> tuple[dict[str, tuple[int, int]], AdapterFiles]:
    """The tensors of an adapter's file, names and sizes, and where each layer's factors lie in them."""
    sizes: dict[str, tuple[int, int]] = {}
    parts: dict[str, tuple[Part, Part]] = {}
    for layer, (outputs, inputs) in adapters_of(shape, settings.targets).items():
        if EXPERTS in layer:
            found = _stacked(layer, outputs, inputs, shape, settings, doubled=True)
        else:
            found = _alone(layer, outputs, inputs, settings)
        sizes |= {found.a.tensor: found.a_dims, found.b.tensor: found.b_dims}
        parts[layer] = found.a, found.b
    return sizes, AdapterFiles(Path(), parts, {}, None)


def _check_tensor(name: str, dims: tuple[int, int], shapes: Mapping[str, tuple[int, ...]], file: Path) -> None:
    """Raise `Refusal` where a tensor is not in the file, or not in this size."""
    if name not in shapes:
        raise Refusal(
            f"{file} without {name}",
            "must have the factors of every layer in adapter.targets",
            "set adapter.targets to the layers that it was made for",
        )
    if shapes[name] != dims:
        raise Refusal(
            f"{name} of shape {shapes[name]} in {file}",
            f"must have shape {dims} by config.json and adapter.rank",
            "use the adapter of this base model",
        )


def _read_config(file: Path, settings: AdapterSettings) -> dict[str, Any]:
    """PEFT's configuration. Raises the first of `_config_problems`."""
    if not file.is_file():
        raise Refusal(
            f"adapter.path={file.parent}", f"must be a folder with PEFT's {CONFIG} and {TENSORS}", "correct the path"
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        for refusal in _config_problems(file, config, settings):
            raise refusal
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Refusal(str(file), "must be PEFT's configuration of a LoRA adapter, in JSON", _AGAIN) from None
    return config


def _config_problems(file: Path, config: dict[str, Any], settings: AdapterSettings) -> Iterator[Refusal]:
    kind, rank, alpha = config["peft_type"], config["r"], config["lora_alpha"]
    if kind != "LORA":
        yield Refusal(f"peft_type={kind} in {file}", "must be LORA", "use an adapter of LoRA")
    for name, own, found in (("rank", settings.rank, rank), ("alpha", settings.alpha, alpha)):
        if own != found:
            key = "r" if name == "rank" else "lora_alpha"
            yield Refusal(
                f"adapter.{name}={own:g}", f"differs from {key}={found} in {file}", f"set adapter.{name}={found}"
            )
    if (beginning := config.get("init_lora_weights")) not in _BEGINNINGS:
        yield Refusal(
            f"init_lora_weights={beginning} in {file}",
            "changes the base's weights too, and this run has them as they are",
            "convert it to plain LoRA with PEFT's path_initial_model_for_weight_conversion",
        )
    doubled = {"rank_pattern": 2 * rank, "alpha_pattern": 2 * alpha}
    for key, value in config.items():
        if key in doubled and value and _of_gate_and_up(value) == {doubled[key]}:
            continue
        # What is off says nothing, whatever it is; bias has a word for that.
        if key not in _OF_ORIGIN and value not in (None, False, "none", {}, []):
            yield Refusal(
                f"{key}={json.dumps(value)} in {file}",
                "is a kind of LoRA that megarl does not compute with: one rank and scale for all layers, no more",
                "use an adapter without it",
            )


def _of_gate_and_up(pattern: Mapping[str, Any]) -> set[Any] | None:
    """The values of a pattern for the experts' gate and up alone; None of any other."""
    return set(pattern.values()) if all(key.endswith("gate_up_proj") for key in pattern) else None


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in a safetensors file, from its header."""
    if not file.is_file():
        raise Refusal(f"adapter.path={file.parent}", f"must hold {TENSORS}", _AGAIN)
    tensors = tensors_of(file)
    if tensors is None or not all(isinstance(entry.get("shape"), list) for entry in tensors.values()):
        raise Refusal(str(file), "is cut short or not a safetensors file", _AGAIN)
    return {name: tuple(entry["shape"]) for name, entry in tensors.items()}


def config_of(settings: AdapterSettings, shape: ModelShape, base: str) -> dict[str, Any]:
    """PEFT's configuration of an adapter as it is written; `base` is the base model's folder."""
    layers = adapters_of(shape, settings.targets)
    modules = {name.rpartition(".")[2] for name in layers if EXPERTS not in name}
    experts = {name.rpartition(".")[2] for name in layers if EXPERTS in name}
    alpha = int(settings.alpha) if settings.alpha.is_integer() else settings.alpha
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": settings.rank,
        "lora_alpha": alpha,
        "target_modules": sorted(modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    fused = bool(experts - _DOWN)
    stacked = (["gate_up_proj"] if fused else []) + (["down_proj"] if experts & _DOWN else [])
    if stacked:
        config["target_parameters"] = [f"mlp.experts.{name}" for name in stacked]
    if fused:
        pattern = r".*\.gate_up_proj"
        config |= {"rank_pattern": {pattern: 2 * settings.rank}, "alpha_pattern": {pattern: 2 * alpha}}
    return config
