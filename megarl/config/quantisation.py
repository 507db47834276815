"""The format of FP8 checkpoints, as `quantization_config` in config.json states it. Torch-free.

Weights of linear layers are e4m3, each with an fp32 scale for every block of 128 x 128 in `<name>_scale_inv`, by which
its numbers are multiplied to get the weight back. DeepSeek-V3's checkpoints brought it (arXiv 2412.19437, 3.3.2); those
of Qwen3 that are published in FP8 have it, transformers and vLLM read it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megarl.errors import Refusal

#: Rows and columns of a weight that share a scale.
BLOCK = 128

#: Types of weights and of scales, by safetensors' names.
VALUES_TYPE = "F8_E4M3"
SCALES_TYPES = ("F32", "BF16", "F16", "F8_E8M0")

_OTHER_FP8 = ("F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")

#: `quantization_config` of a checkpoint in this format.
BLOCK_FP8: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
}

#: What may be left out, and then says the same.
_IMPLIED = ("fmt",)
#: What changes nothing: which layers are whole is seen from their tensors; the scales' format from the scales.
_WITHOUT_EFFECT = ("modules_to_not_convert", "ignored_layers", "scale_fmt", "dequantize")

_ORIGINAL = "use the checkpoint that it was made from"


def check_quantization(stated: Any, origin: str) -> None:
    """Raise `Refusal` where `quantization_config` states another format than `BLOCK_FP8`."""
    if not isinstance(stated, dict):
        said = [f"={stated}"]
    else:
        given = {key: value for key, value in stated.items() if key not in _WITHOUT_EFFECT}
        said = [f" with {key}={value}" for key, value in given.items() if BLOCK_FP8.get(key) != value]
        said += [f" without {key}" for key in BLOCK_FP8 if key not in stated and key not in _IMPLIED]
    if said:
        raise Refusal(
            f"quantization_config{said[0]} in {origin}",
            f"must be {', '.join(f'{key}={value}' for key, value in BLOCK_FP8.items())}: no other format is read",
            _ORIGINAL,
        )


def scale_name(weight: str) -> str:
    """What the scales of a quantised weight are called, in a checkpoint as in an engine."""
    return f"{weight}_scale_inv"


def blocks(length: int) -> int:
    """How many blocks cover `length` rows or columns; the last may be smaller."""
    return -(-length // BLOCK)


def scales_of(types: Mapping[str, str]) -> dict[str, str]:
    """The name of the scales of every quantised weight, of tensors with their types by safetensors' names."""
    return {name: scale_name(name) for name, kind in types.items() if kind in (VALUES_TYPE, *_OTHER_FP8)}


def scales_refusals(tensors: Mapping[str, tuple[str, tuple[int, ...]]], origin: str) -> Iterator[Refusal]:
    """FP8 weights of another format, without scales, and with scales of other blocks; `tensors` with type and shape."""
    for name, scales in scales_of({name: kind for name, (kind, _) in tensors.items()}).items():
        kind, shape = tensors[name]
        if kind != VALUES_TYPE or len(shape) != 2:
            yield Refusal(f"{name} of type {kind} in {origin}", f"must be a matrix of type {VALUES_TYPE}", _ORIGINAL)
            continue
        if scales not in tensors:
            rule = f"is FP8, so its scales must be there, {scales}"
            yield Refusal(f"{name} in {origin}", rule, f"copy the checkpoint again, or {_ORIGINAL}")
            continue
        (scales_type, have), wanted = tensors[scales], tuple(map(blocks, shape))
        if have != wanted:
            rule = f"must have shape {wanted}: one for every block of {BLOCK} x {BLOCK} of {name}"
            yield Refusal(f"{scales} of shape {have} in {origin}", rule, _ORIGINAL)
        elif scales_type not in SCALES_TYPES:
            rule = f"must be of type {', '.join(SCALES_TYPES)}"
            yield Refusal(f"{scales} of type {scales_type} in {origin}", rule, _ORIGINAL)
