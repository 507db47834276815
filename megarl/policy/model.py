"""Builds the Megatron model of a run: configuration translated, layer spec chosen, data parallelism wrapped on."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend
from megatron.core.optimizer import OptimizerConfig
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megarl.config.grid import Chunk, layers_of_chunks
from megarl.config.model_shape import ModelShape
from megarl.config.schema import RunConfig
from megarl.config.sections import ParallelSettings, RecomputeSettings
from megarl.parallel.cpu_platform import has_cuda
from megarl.reshard.weight_map import padded_vocab_size

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def transformer_config(config: RunConfig, shape: ModelShape) -> TransformerConfig:
    """Megatron's configuration of a run; `config.megatron` may add fields, not change those set here."""
    parallel = config.parallel
    dtype = DTYPES[config.precision]
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
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": config.precision == "bf16",
        # Weights are read or drawn after building, the same under every layout.
        "perform_initialization": False,
        # Micro-batches are bounded in tokens, so their lengths differ; Megatron ties this to the all-to-all dispatcher.
        "variable_seq_lengths": True,
        "moe_token_dispatcher_type": "alltoall",
        # The loss divides by counts over the whole mini-batch; Megatron must not divide gradients again.
        "calculate_per_token_loss": True,
        "finalize_model_grads_func": _sum_gradients,
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "bias_dropout_fusion": False,
        "bias_activation_fusion": has_cuda(),
        "apply_rope_fusion": has_cuda(),
    }
    return TransformerConfig(**(fields | fields_of(TransformerConfig, config.megatron)))


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


def fields_of(vendor_class: type, table: dict[str, Any]) -> dict[str, Any]:
    """The entries of the `megatron:` table that are fields of `vendor_class`."""
    names = {f.name for f in dataclasses.fields(vendor_class)}
    return {key: value for key, value in table.items() if key in names}


def _sum_gradients(model: list[torch.nn.Module], num_tokens: Any = None, **kwargs: Any) -> None:
    """Megatron's gradient reductions without its division by a token count: losses are divided already."""
    finalize_model_grads(model, None, **kwargs)


def layer_spec(config: TransformerConfig, sparse: bool) -> ModuleSpec:
    """A layer with a dense MLP or, `sparse`, a mixture of experts.

    Transformer Engine's spec on a GPU, the CPU layers with the same parameter names elsewhere.
    """
    if has_cuda():
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

        return get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts if sparse else None,
            moe_grouped_gemm=sparse,
            qk_layernorm=config.qk_layernorm,
        )
    from megarl.policy.cpu_layers import CpuRMSNorm, CpuSpecProvider

    backend = CpuSpecProvider()
    qk_norm = CpuRMSNorm if config.qk_layernorm else IdentityOp
    residual: Any = get_bias_dropout_add
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=backend.column_parallel_layer_norm_linear(),
            core_attention=backend.core_attention(),
            linear_proj=backend.row_parallel_linear(),
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )
    # The norm before dense MLPs is part of their first linear layer.
    mlp: dict[str, Any] = (
        {
            "pre_mlp_layernorm": CpuRMSNorm,
            "mlp": get_moe_module_spec_for_backend(backend, config.num_moe_experts, moe_grouped_gemm=True),
        }
        if sparse
        else {"mlp": get_mlp_module_spec_for_backend(backend)}
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=attention, self_attn_bda=residual, mlp_bda=residual, **mlp
        ),
    )


def block_spec(config: TransformerConfig, shape: ModelShape, layers: range) -> TransformerBlockSubmodules:
    """The spec of the decoder layers `layers` of the whole model, and of the norm after the last one."""
    kinds = {sparse: layer_spec(config, sparse) for sparse in {shape.is_sparse(layer) for layer in layers}}
    norm: Any
    if has_cuda():
        from megatron.core.extensions.transformer_engine import TENorm as norm
    else:
        from megarl.policy.cpu_layers import CpuRMSNorm as norm
    return TransformerBlockSubmodules(layer_specs=[kinds[shape.is_sparse(layer)] for layer in layers], layer_norm=norm)


def build_model(config: TransformerConfig, shape: ModelShape, chunks: Sequence[Chunk]) -> list[GPTModel]:
    """This rank's model chunks, uninitialised, with the output layer deferred (see `_defer_head`)."""
    return [
        _build_chunk(config, shape, chunk, number if len(chunks) > 1 else None) for number, chunk in enumerate(chunks)
    ]


def _build_chunk(config: TransformerConfig, shape: ModelShape, chunk: Chunk, number: int | None) -> GPTModel:
    """One chunk; `number` is Megatron's vp_stage, None without the interleaved schedule."""
    spec: Any = block_spec(config, shape, chunk.layers)
    model = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=padded_vocab_size(shape.vocab_size, config.tensor_model_parallel_size),
        max_sequence_length=shape.max_positions,
        pre_process=chunk.first,
        post_process=chunk.last,
        parallel_output=True,
        share_embeddings_and_output_weights=shape.tied_embeddings,
        # On the CPU the attention rotates queries and keys itself, with tables made once per micro-batch.
        position_embedding_type="rope" if has_cuda() else "none",
        rotary_base=int(shape.rope_theta),
        vp_stage=number,
    )
    _mark_shards(model)
    _mark_experts(model)
    if model.post_process:
        model.output_layer.forward = types.MethodType(_defer_head, model.output_layer)
    return model


def _mark_shards(model: GPTModel) -> None:
    """Mark the parameters of which each tensor-parallel rank holds a part of its own.

    Megatron marks weights as it initialises them, which is left out here. Without the mark the gradient norm counts
    every weight on the first rank alone, as a copy that all ranks share.
    """
    for module in model.modules():
        if isinstance(module, VocabParallelEmbedding | ColumnParallelLinear | RowParallelLinear):
            weight = module.weight
            if weight is not None and not hasattr(weight, "tensor_model_parallel"):
                set_tensor_model_parallel_attributes(weight, True, int(isinstance(module, RowParallelLinear)), 1)


def _mark_experts(model: GPTModel) -> None:
    """Mark the experts' weights as shared by other ranks than all other weights.

    Megatron marks them where experts are parallel. That their tensor parallelism differs from that of the other layers
    has the same consequence; and marked in every layout, they have an optimizer of their own in every layout, so
    that checkpoints fit. Each rank's weights are its own: see `_mark_shards`.
    """
    for name, parameter in model.named_parameters():
        if ".mlp.experts." in name:
            attributes: Any = parameter
            attributes.allreduce = False
            if not hasattr(parameter, "tensor_model_parallel"):
                set_tensor_model_parallel_attributes(parameter, True, int(".linear_fc2." in name), 1)


def _defer_head(
    layer: torch.nn.Module, hidden: torch.Tensor, weight: Any = None, runtime_gather_output: Any = None
) -> tuple[torch.Tensor, None]:
    """Stands in for the output layer's forward: hands out the hidden states instead of full-size logits.

    The loss makes logits itself, in chunks. What stays here is the layer's tensor-parallel entry: whole
    sequences forward, summed gradients backward.
    """
    if layer.sequence_parallel:
        return tensor_parallel.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True), None
    whole = tensor_parallel.copy_to_tensor_model_parallel_region(hidden)
    if whole.requires_grad:
        # Megatron sums a copy of a gradient that is not contiguous, and drops the sum. Padded micro-batches of several
        # rows leave here transposed, and so their gradient comes back.
        whole.register_hook(torch.Tensor.contiguous)
    return whole, None


def wrap_data_parallel(
    config: RunConfig, megatron_config: TransformerConfig, chunks: Sequence[GPTModel]
) -> list[DistributedDataParallel]:
    """Gradient buffers and reductions over the data-parallel group, sharded for the distributed optimizer."""
    fields: dict[str, Any] = {
        "use_distributed_optimizer": True,
        "grad_reduce_in_fp32": True,
        "overlap_grad_reduce": False,
    }
    ddp = DistributedDataParallelConfig(**(fields | fields_of(DistributedDataParallelConfig, config.megatron)))
    wrapped: list[Any] = [
        DistributedDataParallel(config=megatron_config, ddp_config=ddp, module=chunk, disable_bucketing=number > 0)
        for number, chunk in enumerate(chunks)
    ]
    for one in wrapped:
        for buffer in (*one.buffers, *one.expert_parallel_buffers):
            _count_padding(buffer)
    return wrapped


def _count_padding(buffer: Any) -> None:
    """Count the padding at the end of a gradient buffer's buckets as data.

    Megatron's checkpoints cut it off every bucket, and then look parameters up by their places before the cut: what
    stands behind a padded bucket would be saved shifted. Under pipeline parallelism tied embeddings do.
    """
    buffer.numel_unpadded = buffer.numel
    for bucket in buffer.buckets:
        bucket.numel_unpadded = bucket.grad_data.numel()


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
        "bf16": config.precision == "bf16",
        "params_dtype": DTYPES[config.precision],
        "use_distributed_optimizer": True,
    }
    return OptimizerConfig(**(fields | fields_of(OptimizerConfig, config.megatron)))
