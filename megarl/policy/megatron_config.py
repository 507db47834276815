"""A run's configuration as Megatron's: fields of its TransformerConfig and OptimizerConfig."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from megarl.config.grid import layers_of_chunks
from megarl.config.model_shape import ModelShape
from megarl.config.schema import RunConfig
from megarl.config.sections import ParallelSettings, RecomputeSettings
from megarl.formats.huggingface import PRECISIONS
from megarl.ops.fp8 import E5M2, RECIPES
from megarl.parallel.cpu_platform import has_cuda


def transformer_config(config: RunConfig, shape: ModelShape) -> TransformerConfig:
    """Megatron's configuration of a run; `config.megatron` may add fields, not change those set here."""
    parallel = config.parallel
    dtype = PRECISIONS[config.params_dtype]
    fields: dict[str, Any] = {
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.ffn_size,
        "num_attention_heads": shape.num_heads,
        "num_query_groups": shape.num_kv_heads,
        "kv_channels": shape.head_dim,
        "qk_layernorm": shape.qk_norm,
        "add_qkv_bias": shape.qkv_bias,
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "normalization": "RMSNorm",
        "layernorm_epsilon": shape.norm_epsilon,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "tensor_model_parallel_size": parallel.tensor,
        "pipeline_model_parallel_size": parallel.pipeline,
        "context_parallel_size": parallel.context,
        "sequence_parallel": parallel.sequence,
        **_pipeline_layout(parallel, shape),
        **_recompute(config.recompute),
        **(_experts(config, shape) if shape.is_moe else {}),
        **(_fp8(config) if config.uses_fp8 and has_cuda() else {}),
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": config.params_dtype == "bf16",
        # Weights are read or drawn after building, the same under every layout.
        "perform_initialization": False,
        # Megatron waits for the device after every message, against a fault of old versions of PyTorch.
        "batch_p2p_sync": False,
        # Micro-batches are bounded in tokens, so their lengths differ; Megatron ties this to the all-to-all dispatcher.
        "variable_seq_lengths": not messages_of_one_length(config),
        "moe_token_dispatcher_type": "alltoall",
        # The loss divides by counts over the whole mini-batch; Megatron must not divide gradients again.
        "calculate_per_token_loss": True,
        "finalize_model_grads_func": _left_to_the_step,
        # Where it is right it is set on the layers: `megarl.policy.model.fuse_weight_gradients`.
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "deterministic_mode": config.deterministic,
        "persist_layer_norm": False,
        "bias_dropout_fusion": False,
        "bias_activation_fusion": has_cuda(),
        "apply_rope_fusion": has_cuda(),
    }
    return TransformerConfig(**(fields | fields_of(TransformerConfig, config.megatron)))


def messages_of_one_length(config: RunConfig) -> bool:
    """Whether the micro-batches of a pass are padded to one length.

    Else every message between stages comes after one that says its shape, which a GPU is waited for to read. Packed
    micro-batches differ little: all but the last of a pass are full.
    """
    return has_cuda() and config.parallel.pipeline > 1 and config.batch.packed


def _pipeline_layout(parallel: ParallelSettings, shape: ModelShape) -> dict[str, Any]:
    """Megatron's fields for which layers each model chunk has; none where there is but one chunk."""
    counts = layers_of_chunks(shape.num_layers, parallel)
    if len(counts) == 1:
        return {}
    layout: list[list[str]] = [["decoder"] * count for count in counts]
    layout[0].insert(0, "embedding")
    layout[-1].append("loss")
    fields: dict[str, Any] = {"pipeline_model_parallel_layout": layout}
    if len(counts) > parallel.pipeline:
        fields["virtual_pipeline_model_parallel_size"] = parallel.virtual_pipeline
        # Sent one direction at a time: of two stages, each is before and behind the other, and in one batch the
        # messages of both directions would be taken for each other.
        fields |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    return fields


def _recompute(settings: RecomputeSettings) -> dict[str, Any]:
    if settings.kind == "none":
        return {}
    if settings.kind == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": list(settings.modules)}
    return {
        "recompute_granularity": "full",
        "recompute_method": settings.method,
        "recompute_num_layers": settings.layers,
    }


def _experts(config: RunConfig, shape: ModelShape) -> dict[str, Any]:
    """Megatron's fields of a mixture of experts, no token dropped."""
    coefficient = config.moe.aux_loss_coefficient
    return {
        "num_moe_experts": shape.num_experts,
        "moe_ffn_hidden_size": shape.expert_ffn_size,
        "moe_layer_freq": [int(sparse) for sparse in shape.sparse_layers],
        "moe_router_topk": shape.experts_per_token,
        # The softmax of the chosen experts' logits is that of all experts made to add up to 1.
        "moe_router_pre_softmax": not shape.normalize_topk,
        "moe_router_dtype": config.moe.router_dtype,
        "moe_aux_loss_coeff": shape.router_aux_loss if coefficient is None else coefficient,
        "moe_shared_expert_intermediate_size": shape.shared_expert_ffn_size or None,
        "moe_shared_expert_gate": shape.shared_expert_ffn_size > 0,
        "moe_grouped_gemm": True,
        "expert_model_parallel_size": config.parallel.expert,
        "expert_tensor_parallel_size": config.parallel.expert_tensor,
    }


def _fp8(config: RunConfig) -> dict[str, Any]:
    """Megatron's fields for Transformer Engine's layers; on the CPU `megarl.policy.fp8_layers` has the same of ours.

    What Megatron makes of them (`megatron.core.fp8_utils`): Float8CurrentScaling, DelayedScaling or Float8BlockScaling
    with its defaults, scales of blocks as powers of two; amaxes of delayed scaling reduced over tensor and context
    parallelism. Not over data parallelism: Transformer Engine reduces with every micro-batch, and replicas have
    different numbers of these, so that one would wait for another for good. Under current scaling Transformer Engine
    2.11 reduces an amax over tensor-parallel ranks where sequence parallelism has cut a column-parallel layer's inputs
    or a row-parallel layer's gradients along the tokens; weights, and activations cut along their features, have each
    rank's own, and no setting changes that.

    Tokens of experts are padded with zeros by Megatron's grouped MLP. moe_router_padding_for_quantization, which is
    left off, would send experts other tokens instead, of which amaxes would be.
    """
    settings, recipe = config.fp8, RECIPES[config.precision]
    return {
        "fp8": "hybrid" if recipe.gradients == E5M2 else "e4m3",
        "fp8_recipe": config.precision.removeprefix("fp8-"),
        "fp8_param": settings.param,
        "first_last_layers_bf16": settings.num_layers_at_start_in_bf16 + settings.num_layers_at_end_in_bf16 > 0,
        "num_layers_at_start_in_bf16": settings.num_layers_at_start_in_bf16,
        "num_layers_at_end_in_bf16": settings.num_layers_at_end_in_bf16,
        "fp8_amax_history_len": settings.amax_history_len,
        "fp8_amax_compute_algo": settings.amax_compute_algo,
        "fp8_margin": settings.margin,
        "tp_only_amax_red": True,
    }


def fields_of(vendor_class: type, table: dict[str, Any]) -> dict[str, Any]:
    """The entries of the `megatron:` table that are fields of `vendor_class`."""
    names = {f.name for f in dataclasses.fields(vendor_class)}
    return {key: value for key, value in table.items() if key in names}


def _left_to_the_step(model: list[torch.nn.Module], num_tokens: Any = None, **kwargs: Any) -> None:
    """Megatron would sum gradients over ranks at the end of every pass, and again what was summed before; several
    passes may come before a step, which sums (`megarl.policy.trained_set`)."""


def optimizer_config(config: RunConfig) -> OptimizerConfig:
    """Megatron's optimizer settings: AdamW in fp32, sharded over data parallelism."""
    settings = config.optimizer
    fields: dict[str, Any] = {
        "optimizer": "adam",
        "lr": settings.lr,
        "min_lr": settings.min_lr,
        "weight_decay": settings.weight_decay,
        "adam_beta1": settings.betas[0],
        "adam_beta2": settings.betas[1],
        "adam_eps": settings.epsilon,
        "clip_grad": settings.clip_grad,
        "bf16": config.params_dtype == "bf16",
        "params_dtype": PRECISIONS[config.params_dtype],
        "use_distributed_optimizer": True,
        # How its weights become FP8 ones, where they are.
        "fp8_recipe": config.precision.removeprefix("fp8-") if config.fp8.param and has_cuda() else None,
    }
    return OptimizerConfig(**(fields | fields_of(OptimizerConfig, config.megatron)))
