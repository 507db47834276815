"""Rules of FP8: of its settings, of the shapes that it can multiply, of the GPU and the libraries. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from megarl.config.base import without_effect
from megarl.config.fp8 import BLOCKWISE, DELAYED, MULTIPLE, Fp8Settings
from megarl.config.implied import Implied
from megarl.config.model_shape import ModelShape
from megarl.config.schema import RunConfig
from megarl.errors import Refusal

_OF_HISTORY = ("amax_history_len", "amax_compute_algo", "margin")

#: The least compute capability, as Transformer Engine's check_recipe_support has it. From 10.0 on it computes
#: fp8-blockwise as MXFP8, which takes scales that are powers of two.
HARDWARE = {"fp8-tensorwise": (8, 9), DELAYED: (8, 9), BLOCKWISE: (9, 0)}
#: The Transformer Engine that megatron-core wants (`megatron.core.fp8_utils.get_fp8_recipe`).
_ENGINE = {"fp8-tensorwise": (2, 2), DELAYED: (2, 1), BLOCKWISE: (2, 3)}
#: Transformer Engine's check_fp8_block_scaling_support: cuBLAS multiplies blocks from here on.
_BLOCKWISE_CUDA = (12, 9)


def refusals(config: RunConfig, shape: ModelShape) -> Iterator[Refusal]:
    """What cannot be asked of FP8, whatever the machine."""
    names, cause = tuple(Fp8Settings.model_fields), f"with precision={config.precision}"
    if not config.uses_fp8:
        fix = "set precision to fp8-tensorwise, fp8-delayed or fp8-blockwise, or remove it"
        yield from without_effect(config.fp8, "fp8", names, cause, fix)
        return
    if config.precision != DELAYED:
        yield from without_effect(config.fp8, "fp8", _OF_HISTORY, cause, f"set precision={DELAYED}, or remove it")
    yield from _layers_in_bf16(config, shape)
    yield from _delayed(config)
    yield from _parameters(config)
    yield from _shapes(config, shape)


def _layers_in_bf16(config: RunConfig, shape: ModelShape) -> Iterator[Refusal]:
    counts = {name: getattr(config.fp8, name) for name in Fp8Settings.model_fields if name.startswith("num_layers")}
    most = shape.num_layers // config.parallel.pipeline
    for name, count in counts.items():
        if count and config.precision == DELAYED:
            yield Refusal(
                f"fp8.{name}={count} with precision={DELAYED}",
                "is not possible: Megatron has delayed scaling in all layers or in none",
                "remove it, or set precision=fp8-tensorwise or fp8-blockwise",
            )
        elif count > most:
            yield Refusal(
                f"fp8.{name}={count}", f"must not exceed the {most} layers of a pipeline stage", f"use at most {most}"
            )
    if sum(counts.values()) >= shape.num_layers:
        yield Refusal(
            " + ".join(f"fp8.{name}={count}" for name, count in counts.items()),
            f"leaves none of the model's {shape.num_layers} layers in FP8",
            "use fewer, or set precision=bf16",
        )


def _delayed(config: RunConfig) -> Iterator[Refusal]:
    if config.precision != DELAYED or config.recompute.kind != "selective":
        return
    for module in ("moe_act", "layernorm"):
        if module in config.recompute.modules:
            yield Refusal(
                f"recompute.modules={module} with precision={DELAYED}",
                "is not possible: Megatron recomputes it with the histories of the next pass",
                "remove it, or set precision=fp8-tensorwise or fp8-blockwise",
            )


def _parameters(config: RunConfig) -> Iterator[Refusal]:
    if not config.fp8.param:
        return
    implied = Implied(config)
    if implied.adapter is not None:
        yield Refusal(
            "fp8.param=true with an adapter",
            "is not possible: an adapter is merged into bf16 weights",
            "remove it, or train without an adapter",
        )
    if implied.parameter_sets:
        yield Refusal(
            f"fp8.param=true with the parameter set {implied.parameter_sets[0].name}",
            "is not possible: other weights take the place of the policy's, which would have to be in FP8 too",
            "remove it",
        )


class Linear(NamedTuple):
    """A linear layer of decoder layers as one rank has it, in Megatron's names; `cut` is the setting that says over how
    many ranks its cut side is spread."""

    name: str
    inputs: int
    outputs: int
    cut: str


def linears(config: RunConfig, shape: ModelShape, tensor: int, expert_tensor: int) -> Iterator[Linear]:
    """The layers that multiply in FP8; sides that do not come out even are rounded down."""
    hidden, heads = shape.hidden_size, shape.num_heads * shape.head_dim
    fused = heads + 2 * shape.num_kv_heads * shape.head_dim
    yield Linear("self_attention.linear_qkv", hidden, fused // tensor, "tensor")
    yield Linear("self_attention.linear_proj", heads // tensor, hidden, "tensor")
    of_experts = "expert_tensor" if config.parallel.expert_tensor else "tensor"
    for name, size, ranks, cut, there in (
        ("mlp", shape.ffn_size, tensor, "tensor", not (shape.is_moe and all(shape.sparse_layers))),
        ("mlp.experts", shape.expert_ffn_size, expert_tensor, of_experts, shape.is_moe),
        ("mlp.shared_experts", shape.shared_expert_ffn_size, tensor, "tensor", shape.shared_expert_ffn_size > 0),
    ):
        if there:
            yield Linear(f"{name}.linear_fc1", hidden, 2 * (size // ranks), cut)
            yield Linear(f"{name}.linear_fc2", size // ranks, hidden, cut)


def _shapes(config: RunConfig, shape: ModelShape) -> Iterator[Refusal]:
    parallel = config.parallel
    tensor, expert_tensor = parallel.tensor, parallel.expert_tensor or parallel.tensor
    for layer in linears(config, shape, tensor, expert_tensor):
        for side, size in (("inputs", layer.inputs), ("outputs", layer.outputs)):
            if size % MULTIPLE == 0:
                continue
            ranks = getattr(parallel, layer.cut)
            fitting = [n for n in range(1, ranks) if ranks % n == 0 and _fits(config, shape, layer, n)]
            setting = f"parallel.{layer.cut}={ranks}"
            yield Refusal(
                f"precision={config.precision} with {setting}",
                f"gives {layer.name} {size} {side} on a rank, which must be a multiple of {MULTIPLE}",
                f"set parallel.{layer.cut}={fitting[-1]}, or precision=bf16" if fitting else "set precision=bf16",
            )
            break


def _fits(config: RunConfig, shape: ModelShape, wanted: Linear, ranks: int) -> bool:
    """Whether a layer can be multiplied in FP8 where its cut side is spread over so many ranks."""
    found = [one for one in linears(config, shape, ranks, ranks) if one.name == wanted.name]
    return all(one.inputs % MULTIPLE == 0 and one.outputs % MULTIPLE == 0 for one in found)


def on_cpu(config: RunConfig) -> Iterator[Refusal]:
    """What the CPU layers do not do."""
    if config.fp8.param and config.precision != BLOCKWISE:
        yield Refusal(
            f"fp8.param=true with precision={config.precision} on the CPU",
            "is not possible: weights are in bf16 there, which FP8's values fit with powers of two as scales alone",
            f"remove it, or set precision={BLOCKWISE}",
        )


def on_gpu(config: RunConfig, capability: tuple[int, int]) -> Iterator[Refusal]:
    """What a GPU of that compute capability does not do."""
    if config.uses_fp8 and capability < (needed := HARDWARE[config.precision]):
        least, found = (".".join(map(str, one)) for one in (needed, capability))
        other = " or fp8-tensorwise" if capability >= HARDWARE["fp8-tensorwise"] else ""
        rule = f"needs GPUs of compute capability {least} or more, not {found}"
        yield Refusal(f"precision={config.precision}", rule, f"set precision=bf16{other}")


def of_libraries(config: RunConfig, engine: str | None, cuda: str | None, fp32_scales: bool) -> Iterator[Refusal]:
    """What the libraries of a machine with a GPU do not do.

    Args:
        engine: Transformer Engine's version; None where it is not installed.
        cuda: the version that torch was built with.
        fp32_scales: whether NVTE_FP8_BLOCK_SCALING_FP32_SCALES asks Transformer Engine for scales of any size.
    """
    if not config.uses_fp8:
        return
    value = f"precision={config.precision}"
    least = _ENGINE[config.precision]
    if engine is None or _version(engine) < least:
        found = "none is installed" if engine is None else f"{engine} is installed"
        yield Refusal(value, f"needs Transformer Engine {least[0]}.{least[1]} or later, and {found}", "install it")
    if config.precision == BLOCKWISE and _version(cuda or "0") < _BLOCKWISE_CUDA:
        rule = f"needs CUDA {'.'.join(map(str, _BLOCKWISE_CUDA))} or later, and torch was built with {cuda}"
        yield Refusal(value, rule, "set precision=fp8-tensorwise")
    if config.precision == BLOCKWISE and fp32_scales:
        yield Refusal(
            "NVTE_FP8_BLOCK_SCALING_FP32_SCALES",
            f"must not be 1 with precision={BLOCKWISE}, whose scales are powers of two",
            "unset it",
        )


def _version(text: str) -> tuple[int, ...]:
    """The first two numbers of a version."""
    return tuple(int("".join(filter(str.isdigit, part)) or 0) for part in f"{text}.0".split(".")[:2])
