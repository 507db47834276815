"""Adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`. Torch-free.

PEFT names a layer's factors by its module in the Hugging Face model. Since transformers 5 a mixture's experts are no
modules but two stacked parameters, gate with up and down, each of which PEFT gives one pair of factors for all experts
(`target_parameters`). Both are read; written are the factors of each expert under the checkpoint's own names, which
PEFT turns into stacked ones as it loads them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megarl.config.adapters import ALL_LINEAR, AdapterSettings
from megarl.config.model_shape import ModelShape
from megarl.errors import Refusal
from megarl.reshard.adapter_map import adapters_of

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
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
    """An adapter on disk: where each layer's A and B are."""

    folder: Path
    parts: Mapping[str, tuple[Part, Part]]


def tensor_name(layer: str, factor: str) -> str:
    """PEFT's name of a layer's `lora_A` or `lora_B`."""
    return f"{_PREFIX}{layer}.{factor}.weight"


def open_adapter(folder: Path, settings: AdapterSettings, shape: ModelShape) -> AdapterFiles:
    """The adapter in `folder`, which must be one of this model and these settings.

    Raises `Refusal` for files that are missing or damaged, for kinds of LoRA that are not those of megarl, and for an
    adapter of another base, rank or scale, or of other layers than `adapter.targets`.
    """
    for refusal in _config_problems(folder / CONFIG, settings):
        raise refusal
    shapes = _shapes(folder / TENSORS)
    wanted = adapters_of(shape, settings.targets)
    parts = {layer: _parts(layer, sizes, shapes, settings.rank, shape) for layer, sizes in wanted.items()}
    for layer, (outputs, inputs) in wanted.items():
        for part, factor, dims in zip(
            parts[layer], ("lora_A", "lora_B"), ((settings.rank, inputs), (outputs, settings.rank)), strict=True
        ):
            _check_part(part, f"{layer}.{factor}", dims, shapes, folder / TENSORS)
    used = {part.tensor for both in parts.values() for part in both}
    for name in sorted(shapes.keys() - used):
        raise Refusal(
            f"{name} in {folder / TENSORS}",
            "is of no layer in adapter.targets",
            "add its layer to adapter.targets, or use the adapter of this base model",
        )
    return AdapterFiles(folder, parts)


def _check_part(
    part: Part, name: str, dims: tuple[int, int], shapes: Mapping[str, tuple[int, ...]], file: Path
) -> None:
    """Raise `Refusal` where the factor `name`, of `dims`, is not in the file, or not in this size."""
    if part.tensor not in shapes:
        raise Refusal(
            f"{file} without {part.tensor}",
            "must have the factors of every layer in adapter.targets",
            "set adapter.targets to the layers that it was made for",
        )
    stored = shapes[part.tensor]
    cuts = zip((part.rows, part.columns), stored, strict=False)
    if len(stored) != 2 or tuple(len(range(*cut.indices(extent))) for cut, extent in cuts) != dims:
        raise Refusal(
            f"{part.tensor} of shape {stored} in {file}",
            f"must give {name} the shape {dims} by config.json and adapter.rank",
            "use the adapter of this base model",
        )


def _parts(
    layer: str, sizes: tuple[int, int], shapes: Mapping[str, tuple[int, ...]], rank: int, shape: ModelShape
) -> tuple[Part, Part]:
    """Where a layer's factors are: under its own name, or as an expert's in those of all experts."""
    own = (
        Part(tensor_name(layer, "lora_A"), slice(None), slice(None)),
        Part(tensor_name(layer, "lora_B"), slice(None), slice(None)),
    )
    before, _, after = layer.partition(".experts.")
    if not after or own[0].tensor in shapes:
        return own
    expert, _, leaf = after.partition(".")
    outputs, inputs = sizes
    down = leaf in ("down_proj", "w2")
    wanted = inputs, outputs if down else 2 * outputs
    # Which of the two is outside is as PEFT came upon them: their sizes tell them apart.
    block = before.rpartition(".")[0] + ".mlp.experts"
    for stacked in (f"{block}.base_layer", block):
        a, b = (tensor_name(stacked, factor) for factor in ("lora_A", "lora_B"))
        if a in shapes and b in shapes and (shapes[a][-1], shapes[b][0]) == wanted:
            start, first = int(expert) * rank, outputs if leaf in ("up_proj", "w3") else 0
            return (
                Part(a, slice(start, start + rank), slice(None)),
                # Of all experts' first columns first.
                Part(b, slice(first, first + outputs), slice(int(expert), None, shape.num_experts)),
            )
    return own


def _config_problems(file: Path, settings: AdapterSettings) -> Iterator[Refusal]:
    if not file.is_file():
        yield Refusal(
            f"adapter.path={file.parent}", f"must be a folder with PEFT's {CONFIG} and {TENSORS}", "correct the path"
        )
        return
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        kind, rank, alpha = config["peft_type"], config["r"], config["lora_alpha"]
    except (ValueError, KeyError, TypeError):
        yield Refusal(str(file), "must be PEFT's configuration of a LoRA adapter, in JSON", _AGAIN)
        return
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
    for key, value in config.items():
        # What is off says nothing, whatever it is; bias has a word for that.
        if key not in _OF_ORIGIN and value not in (None, False, "none", {}, []):
            yield Refusal(
                f"{key}={json.dumps(value)} in {file}",
                "is a kind of LoRA that megarl does not compute with: one rank and scale for all layers, no more",
                "use an adapter without it",
            )


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in a safetensors file, from its header."""
    if not file.is_file():
        raise Refusal(f"adapter.path={file.parent}", f"must hold {TENSORS}", _AGAIN)
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        try:
            header = json.loads(stream.read(min(size, file.stat().st_size)))
            found = {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            raise Refusal(str(file), "is cut short or not a safetensors file", _AGAIN) from None
    if file.stat().st_size != 8 + size + max(ends, default=0):
        raise Refusal(str(file), "is cut short or not a safetensors file", _AGAIN)
    return found


def config_of(settings: AdapterSettings, shape: ModelShape, base: str) -> dict[str, Any]:
    """PEFT's configuration of an adapter; `base` is the base model's folder."""
    leaves = dict.fromkeys(name.rpartition(".")[2] for name in adapters_of(shape, (ALL_LINEAR,)))
    targets: Sequence[str] = [one for one in settings.targets if one != ALL_LINEAR]
    if ALL_LINEAR in settings.targets:
        targets = [*leaves, *targets]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": settings.rank,
        "lora_alpha": int(settings.alpha) if settings.alpha.is_integer() else settings.alpha,
        "target_modules": sorted(set(targets)),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
