"""Builds the Megatron model of a run: layer spec chosen, model chunks built, data parallelism wrapped on."""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend
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

from megarl.config.grid import Chunk
from megarl.config.model_shape import ModelShape
from megarl.config.schema import RunConfig
from megarl.parallel.cpu_platform import has_cuda
from megarl.policy.megatron_config import fields_of
from megarl.reshard.weight_map import padded_vocab_size


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


def is_expert(parameter: torch.nn.Parameter) -> bool:
    """Whether a parameter is an expert's, which the expert-parallel ranks share out."""
    return not getattr(parameter, "allreduce", True)


def copy_number(*, expert: bool) -> int:
    """This rank's number among those with the same weights, its own part of an expert's or of all others."""
    groups: Any = parallel_state
    if expert:
        return groups.get_expert_data_parallel_group().rank()
    return groups.get_data_parallel_group(with_context_parallel=True).rank()


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
    config: RunConfig, megatron_config: TransformerConfig, modules: Sequence[torch.nn.Module]
) -> list[DistributedDataParallel]:
    """Gradient buffers and reductions over the data-parallel group, sharded for the distributed optimizer.

    `modules`: a rank's model chunks, or what trains beside them.
    """
    fields: dict[str, Any] = {
        "use_distributed_optimizer": True,
        "grad_reduce_in_fp32": True,
        "overlap_grad_reduce": False,
        "fp8_param_gather": config.fp8.param and has_cuda(),
    }
    ddp = DistributedDataParallelConfig(**(fields | fields_of(DistributedDataParallelConfig, config.megatron)))
    wrapped: list[Any] = [
        DistributedDataParallel(config=megatron_config, ddp_config=ddp, module=module, disable_bucketing=number > 0)
        for number, module in enumerate(modules)
    ]
    for one in wrapped:
        for buffer in (*one.buffers, *one.expert_parallel_buffers):
            _count_padding(buffer)
    return wrapped


def fuse_weight_gradients(modules: Sequence[torch.nn.Module]) -> None:
    """Have Transformer Engine's layers add their weights' gradients to the buffers, in fp32, as they multiply.

    After building, as Megatron's output layer would refuse it without apex. Not under FP8: there Megatron tells them at
    the start of every pass that its first micro-batch is their first, whose gradient they write over what is there,
    that of an earlier pass before the same step. In bf16 that is so once, with empty buffers. Nor with an adapter:
    the weights that it makes have no buffers.
    """
    for module in modules:
        for layer in module.modules():
            if hasattr(layer, "fuse_wgrad_accumulation"):
                fused: Any = layer
                fused.fuse_wgrad_accumulation = True


def _count_padding(buffer: Any) -> None:
    """Count the padding at the end of a gradient buffer's buckets as data.

    Megatron's checkpoints cut it off every bucket, and then look parameters up by their places before the cut: what
    stands behind a padded bucket would be saved shifted. Under pipeline parallelism tied embeddings do.
    """
    buffer.numel_unpadded = buffer.numel
    for bucket in buffer.buckets:
        bucket.numel_unpadded = bucket.grad_data.numel()
