"""What fits with what: processes, tensor, pipeline, context, expert and data parallelism, the model, the engine.

    processes = tensor x pipeline x context x data                    for all but the experts
              = expert_tensor x pipeline x expert x expert data       for the experts

    tensor          divides the attention heads, the rows of dense MLPs and of a shared expert; divides the key-value
                    heads or is a multiple of them
    sequence        only with tensor > 1; must be on for a mixture of experts with tensor > 1
    pipeline        x virtual_pipeline divides the layers (with the embedding and the loss where they count as layers),
                    or stage_layers says the layers of each; every stage has a layer
    context         pads each sequence to a multiple of 2 x context; all-to-all attention (megatron.cp_comm_type=a2a)
                    needs heads that tensor x context divides
    expert          divides the experts; expert_tensor divides the rows of an expert's MLP
    rollout.tensor  divides the processes, and what tensor divides; and the rows of an expert's MLP

An engine in FP8 wants more of what is cut: `megarl.config.block_rules`.

Torch-free. What a size of tensor or expert parallelism divides stands in `megarl.config.splits`.
"""

from __future__ import annotations

from collections.abc import Iterator

from megarl.config import block_rules, splits
from megarl.config.base import without_effect
from megarl.config.grid import layers_of_chunks
from megarl.config.model_shape import ModelShape
from megarl.config.schema import RunConfig
from megarl.config.wording import divisors
from megarl.errors import Refusal

#: What Megatron-core 0.19.2 can recompute of the layers that megarl builds; the second only in mixtures of experts.
RECOMPUTED = ("core_attn", "layernorm", "mlp")
RECOMPUTED_EXPERTS = ("moe", "moe_act", "shared_experts")


def of_grid(config: RunConfig, world: int) -> Iterator[Refusal]:
    """What does not fit `world` processes, whatever the model."""
    parallel = config.parallel
    if parallel.sequence and parallel.tensor == 1:
        yield Refusal(
            "parallel.sequence=true", "needs parallel.tensor > 1", "set parallel.tensor to 2 or more, or leave it off"
        )
    model_ranks = parallel.tensor * parallel.pipeline * parallel.context
    if world % model_ranks:
        yield Refusal(
            f"parallel.processes={world}",
            f"must be a multiple of parallel.tensor x parallel.pipeline x parallel.context = {model_ranks}",
            f"use {model_ranks} processes or a multiple of it",
        )
    else:
        expert_tensor = parallel.expert_tensor or parallel.tensor
        stage = world // parallel.pipeline
        if stage % (parallel.expert * expert_tensor):
            yield Refusal(
                f"parallel.expert={parallel.expert} with expert tensor parallelism {expert_tensor}",
                f"must together divide the {stage} processes of a pipeline stage",
                "lower parallel.expert or parallel.expert_tensor, or use more processes",
            )
    if world % config.rollout.tensor:
        yield Refusal(
            f"rollout.tensor={config.rollout.tensor}",
            f"must divide the {world} processes evenly into engine replicas",
            f"use {divisors(world)}",
        )


def of_model(config: RunConfig, shape: ModelShape) -> Iterator[Refusal]:
    """What does not fit the model."""
    parallel = config.parallel
    yield from splits.policy_refusals(shape, parallel)
    yield from _attention(config, shape)
    yield from _experts(config) if shape.is_moe else _no_experts(config, shape)
    try:
        chunks = layers_of_chunks(shape.num_layers, parallel)
    except Refusal as refusal:
        yield refusal
    else:
        yield from _recompute(config, shape, fewest=min(chunks))
    yield from splits.engine_refusals(shape, config.rollout.tensor, config.rollout.expert_parallel)
    yield from block_rules.refusals(config, shape)


def _attention(config: RunConfig, shape: ModelShape) -> Iterator[Refusal]:
    if shape.attention_out_bias:
        yield Refusal(
            "attention_bias=true in the model's config.json",
            "gives the attention's output a bias, which Megatron's layers have only together with biases in the MLP",
            "use a model without it",
        )
    heads = config.parallel.tensor * config.parallel.context
    if config.megatron.get("cp_comm_type") == "a2a" and shape.num_heads % heads:
        yield Refusal(
            "megatron.cp_comm_type=a2a",
            f"needs attention heads that parallel.tensor x parallel.context = {heads} divides, not {shape.num_heads}",
            "remove it (p2p needs none), or lower parallel.context",
        )


def _experts(config: RunConfig) -> Iterator[Refusal]:
    parallel = config.parallel
    if parallel.tensor > 1 and not parallel.sequence:
        yield Refusal(
            f"parallel.tensor={parallel.tensor} without parallel.sequence",
            "is not possible for a mixture of experts: Megatron dispatches each token from one rank",
            "set parallel.sequence=true",
        )
    if config.moe.routing_replay != "off" and not config.algorithm.generates:
        yield Refusal(
            f"moe.routing_replay={config.moe.routing_replay}",
            "needs an algorithm that generates: the experts are those of the engine",
            "remove it",
        )
    if config.moe.routing_replay != "off" and config.rollout.replay is not None:
        yield Refusal(
            f"moe.routing_replay={config.moe.routing_replay}",
            "needs rollouts that are generated: saved ones come without their routing",
            "set moe.routing_replay=off, or remove rollout.replay",
        )
    if config.moe.routing_replay != "off" and config.vllm.get("enable_prefix_caching") is False:
        yield Refusal(
            "vllm.enable_prefix_caching=false",
            "must be left on where routing is recorded, which vLLM keeps by cached block",
            "remove it, or set moe.routing_replay=off",
        )


def _no_experts(config: RunConfig, shape: ModelShape) -> Iterator[Refusal]:
    moe = config.moe
    if moe.aux_loss_coefficient is not None:
        yield splits.of_mixtures(f"moe.aux_loss_coefficient={moe.aux_loss_coefficient}", shape)
    for name in ("routing_replay", "router_dtype"):
        if (value := getattr(moe, name)) != type(moe).model_fields[name].default:
            yield splits.of_mixtures(f"moe.{name}={value}", shape)


def _recompute(config: RunConfig, shape: ModelShape, fewest: int) -> Iterator[Refusal]:
    recompute = config.recompute
    for kind, names in (("selective", ("modules",)), ("full", ("method", "layers"))):
        if recompute.kind != kind:
            cause, fix = f"with recompute.kind={recompute.kind}", f"set recompute.kind={kind} or remove it"
            yield from without_effect(recompute, "recompute", names, cause, fix)
    known = RECOMPUTED + (RECOMPUTED_EXPERTS if shape.is_moe else ())
    if recompute.kind == "selective":
        for module in recompute.modules:
            if module not in known:
                rule = f"must be among {', '.join(known)} for a {shape.family} model"
                yield Refusal(f"recompute.modules={module}", rule, "remove it, or name one of these")
    if recompute.kind == "full" and recompute.layers > fewest:
        yield Refusal(
            f"recompute.layers={recompute.layers}",
            f"must not exceed the {fewest} layers of the smallest pipeline stage",
            f"use at most {fewest}",
        )
