"""Rules that hold on a GPU alone. Torch-free: a run is checked for its cluster on a machine without one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

from megarl.config.fp8 import DELAYED
from megarl.config.implied import Implied
from megarl.config.model_shape import ModelShape
from megarl.config.quantisation import BLOCK
from megarl.config.schema import RunConfig
from megarl.config.wording import listed
from megarl.errors import Refusal

#: vLLM's kernels that read FP8 blocks on Hopper as a checkpoint has them, by the setting that chooses them.
KEEPING_BACKENDS = {"linear_backend": ("auto", "cutlass", "deep_gemm", "triton"), "moe_backend": ("triton",)}


def refusals(config: RunConfig) -> Iterator[Refusal]:
    """What `config` asks for and a GPU cannot do."""
    yield from chain(of_policy(config), of_repeating(config))
    if Implied(config).records_routing:
        yield from of_recorded_routing(config.vllm, config.rollout.tensor)


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


def of_repeating(config: RunConfig) -> Iterator[Refusal]:
    """What keeps a run on a GPU from repeating: vLLM's numbers depend there on which samples it makes side by side."""
    if config.deterministic and config.rollout.keep_unfinished:
        yield Refusal(
            "rollout.keep_unfinished=true with deterministic=true on a GPU",
            "makes the rest of a step's samples without those that are kept, and so with other bits",
            "remove it, or set deterministic=false",
        )
    if config.deterministic and config.precision == DELAYED:
        yield Refusal(
            f"precision={DELAYED} with deterministic=true on a GPU",
            "cannot resume to the last bit: Transformer Engine's histories of amaxes are in no checkpoint",
            "set another precision, or deterministic=false",
        )


def of_fp8_engine(config: RunConfig, shape: ModelShape) -> Iterator[Refusal]:
    """What vLLM's FP8 kernels cannot take: activations are quantised in rows of whole blocks; and kernels that put
    weights in an order of their own, into which nothing can be pushed."""
    if config.rollout.precision != "fp8":
        return
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


def of_recorded_routing(engine_arguments: Mapping[str, Any], tensor: int) -> Iterator[Refusal]:
    """What stands in the way of recording the experts of every token, by an engine of `tensor` GPUs;
    `engine_arguments`: fields of EngineArgs."""
    if tensor > 1:
        # Every rank has a scheduler, which asks for the record within its step; nothing can be handed on before.
        yield Refusal(
            f"rollout.tensor={tensor} with recorded routing on a GPU",
            "must be 1: vLLM keeps the record on the first rank of an engine, and the others stop without it",
            "set rollout.tensor=1 or moe.routing_replay=off",
        )
    if engine_arguments.get("async_scheduling"):
        yield Refusal(
            "vllm.async_scheduling=true",
            "must be off where routing is recorded: a step would still be under way when prefixes are forgotten",
            "remove it, or do not record the routing",
        )
    if engine_arguments.get("enable_prefix_caching") is False:
        yield Refusal(
            "vllm.enable_prefix_caching=false",
            "must be left on where routing is recorded, which vLLM keeps by cached block",
            "remove it, or do not record the routing",
        )
