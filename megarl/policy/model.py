"""Builds the Megatron model of a run: configuration translated, layer spec chosen, data parallelism wrapped on."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
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

from megarl.config.grid import layers_of_chunks
from megarl.config.model_shape import ModelShape
from megarl.config.schema import RunConfig
from megarl.config.sections import ParallelSettings
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
        # Sent one direction at a time: of two stages, each is before and behind the other, and in one batch the messages
        # of both directions would be taken for each other.
        fields |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    return fields


def fields_of(vendor_class: type, table: dict[str, Any]) -> dict[str, Any]:
    """The entries of the `megatron:` table that are fields of `vendor_class`."""
    names = {f.name for f in dataclasses.fields(vendor_class)}
    return {key: value for key, value in table.items() if key in names}


def _sum_gradients(model: list[torch.nn.Module], num_tokens: Any = None, **kwargs: Any) -> None:
    """Megatron's gradient reductions without its division by a token count: losses are divided already."""
    finalize_model_grads(model, None, **kwargs)


def layer_spec(config: TransformerConfig) -> ModuleSpec:
    """Transformer Engine's spec on a GPU, the CPU layers with the same parameter names elsewhere."""
    if has_cuda():
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
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
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=attention,
            self_attn_bda=residual,
            mlp=get_mlp_module_spec_for_backend(backend),
            mlp_bda=residual,
        ),
    )


def block_spec(config: TransformerConfig, chunk: int | None) -> Any:
    """The spec of a chunk's decoder; the CPU's carries its own final norm, which Megatron would else pick by itself."""
    layer = layer_spec(config)
    if has_cuda():
        return layer
    from megatron.core.transformer.transformer_block import get_num_layers_to_build

    from megarl.policy.cpu_layers import CpuRMSNorm

    norm: Any = CpuRMSNorm
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config, chunk), layer_norm=norm)


def build_model(config: TransformerConfig, shape: ModelShape) -> list[GPTModel]:
    """This rank's model chunks, uninitialised, with the output layer deferred (see `_defer_head`)."""
    virtual = config.virtual_pipeline_model_parallel_size
    return [_build_chunk(config, shape, chunk) for chunk in (range(virtual) if virtual else [None])]


def _build_chunk(config: TransformerConfig, shape: ModelShape, chunk: int | None) -> GPTModel:
    """One chunk; `chunk` is its number under the interleaved schedule, None without it."""
    model = GPTModel(
        config=config,
        transformer_layer_spec=block_spec(config, chunk),
        vocab_size=padded_vocab_size(shape.vocab_size, config.tensor_model_parallel_size),
        max_sequence_length=shape.max_positions,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=chunk is None, vp_stage=chunk),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=chunk is None, vp_stage=chunk),
        parallel_output=True,
        share_embeddings_and_output_weights=shape.tied_embeddings,
        # On the CPU the attention rotates queries and keys itself, with tables made once per micro-batch.
        position_embedding_type="rope" if has_cuda() else "none",
        rotary_base=int(shape.rope_theta),
        vp_stage=chunk,
    )
    _mark_shards(model)
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
