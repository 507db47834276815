"""Rules that hold on a GPU alone. Torch-free: a run is checked for its cluster on a machine without one."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from megarl.config import fp8_rules
from megarl.config.fp8 import BLOCKWISE
from megarl.config.implied import Implied
from megarl.config.model_shape import ModelShape
from megarl.config.quantisation import BLOCK
from megarl.config.schema import RunConfig
from megarl.config.wording import listed
from megarl.errors import Refusal

#: vLLM's kernels that read FP8 blocks on Hopper as a checkpoint has them, by the setting that chooses them.
KEEPING_BACKENDS = {"linear_backend": ("auto", "cutlass", "deep_gemm", "triton"), "moe_backend": ("triton",)}


#: Compute capability of the GPUs on which vLLM's kernels read FP8 blocks as a checkpoint has them (older ones repack
#: weights for Marlin, newer ones pack scales for DeepGEMM), and on which Transformer Engine has a backward pass of
#: attention that repeats: its FusedAttention gives way on others, and what would stand in takes no packed sequences.
HOPPER = (9, 0)


def refusals(config: RunConfig, shape: ModelShape, capability: tuple[int, int]) -> Iterator[Refusal]:
    """What `config` asks for and a GPU of that compute capability cannot do."""
    yield from chain(of_policy(config), fp8_rules.on_gpu(config, capability))
    yield from chain(of_repeating(config, capability), of_fp8_engine(config, shape, capability))
    if Implied(config).records_routing:
        yield from of_recorded_routing(config)


def of_policy(config: RunConfig) -> Iterator[Refusal]:
    """What Transformer Engine's layers cannot do: its only attention in fp32 is that of whole sequences of one length,
    all of them on one rank."""
    context = config.parallel.context
    settings = {
        "batch.packed=true": "batch.packed=false" if config.batch.packed else None,
        f"parallel.context={context}": "parallel.context=1" if context > 1 else None,
    }
    for setting, instead in settings.items():
        if config.precision == "fp32" and instead is not None:
            yield Refusal(
                f"precision=fp32 with {setting} on a GPU",
                "has no attention kernel in Transformer Engine",
                f"set precision=bf16 or {instead}",
            )


def of_repeating(config: RunConfig, capability: tuple[int, int]) -> Iterator[Refusal]:
    """What keeps a run on a GPU from repeating: attention's backward pass; vLLM, whose numbers depend there on which
    samples it makes side by side; and weights in FP8, which checkpoints do not have."""
    if config.deterministic and capability != HOPPER:
        yield Refusal(
            f"deterministic=true on a GPU of compute capability {_shown(capability)}",
            f"Transformer Engine's attention has a backward pass that repeats on {_shown(HOPPER)} (Hopper) alone",
            "set deterministic=false",
        )
    if config.deterministic and config.rollout.keep_unfinished:
        yield Refusal(
            "rollout.keep_unfinished=true with deterministic=true on a GPU",
            "makes the rest of a step's samples without those that are kept, and so with other bits",
            "remove it, or set deterministic=false",
        )
    if config.deterministic and config.fp8.param and config.precision != BLOCKWISE:
        yield Refusal(
            f"fp8.param=true with precision={config.precision} and deterministic=true on a GPU",
            "cannot resume to the last bit: checkpoints have bf16 weights, which FP8's values fit with powers of two "
            "as scales alone",
            f"remove fp8.param, set precision={BLOCKWISE}, or deterministic=false",
        )


def of_fp8_engine(config: RunConfig, shape: ModelShape, capability: tuple[int, int]) -> Iterator[Refusal]:
    """What vLLM's FP8 kernels cannot take: activations are quantised in rows of whole blocks; and GPUs and kernels for
    which weights are put in an order of their own, into which nothing can be pushed."""
    if config.rollout.precision != "fp8":
        return
    if capability != HOPPER:
        yield Refusal(
            f"rollout.precision=fp8 on a GPU of compute capability {_shown(capability)}",
            f"needs {_shown(HOPPER)} (Hopper), where vLLM keeps FP8 blocks as they are pushed",
            "set rollout.precision=bf16",
        )
    if shape.hidden_size % BLOCK:
        yield Refusal(
            "rollout.precision=fp8 on a GPU",
            f"needs a hidden_size that is a multiple of {BLOCK}, not {shape.hidden_size}",
            "set rollout.precision=bf16",
        )
    for name, fit in KEEPING_BACKENDS.items():
        chosen = config.vllm.get(name)
        if chosen is not None and chosen not in fit:
            rule = (
                f"must be {listed(fit)} with rollout.precision=fp8: other kernels keep weights in an order of their own"
            )
            yield Refusal(f"vllm.{name}={chosen}", rule, f"remove vllm.{name}, or set rollout.precision=bf16")


def of_recorded_routing(config: RunConfig) -> Iterator[Refusal]:
    """What stands in the way of recording the experts of every token."""
    if config.vllm.get("async_scheduling"):
        yield Refusal(
            "vllm.async_scheduling=true",
            "must be off where routing is recorded: a step would still be under way when prefixes are forgotten",
            "remove it, or do not record the routing",
        )


def _shown(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
