"""Megatron-core layers for the CPU, with the parameter names of Transformer Engine's layers.

Megatron's own local layers refuse sequence parallelism in norms and packed sequences in attention, and
name parameters differently from the Transformer Engine spec. These do neither, so that a checkpoint
and a layout are the same with and without Transformer Engine.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from megarl.policy.cpu_attention import CpuAttention


class CpuRMSNorm(torch.nn.Module):
    """RMSNorm over the last dimension, in the parameter name (`weight`) of Transformer Engine's."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        _mark_for_sequence_parallel(self.weight, config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class CpuNormColumnParallelLinear(ColumnParallelLinear):
    """RMSNorm, then a column-parallel linear layer; the norm's weight is `layer_norm_weight`."""

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size, dtype=config.params_dtype))
        _mark_for_sequence_parallel(self.layer_norm_weight, config)
        self.layer_norm_epsilon = config.layernorm_epsilon

    def forward(self, input_: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        normed = F.rms_norm(input_, self.layer_norm_weight.shape, self.layer_norm_weight, self.layer_norm_epsilon)
        return super().forward(normed, *args, **kwargs)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> Any:
        """Weight and bias split along the output dimension, the norm replicated."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True), prefix, {"weight": 0, "bias": 0}, sharded_offsets
        )


def _mark_for_sequence_parallel(parameter: torch.nn.Parameter, config: TransformerConfig) -> None:
    # Under sequence parallelism each rank norms its own part of the sequence, so Megatron must sum this
    # parameter's gradient over the tensor-parallel group; it looks for this attribute.
    parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class CpuSpecProvider(BackendSpecProvider):
    """The modules Megatron's spec builders are to use on the CPU."""

    def column_parallel_linear(self) -> type:
        return ColumnParallelLinear

    def row_parallel_linear(self) -> type:
        return RowParallelLinear

    def fuse_layernorm_and_linear(self) -> bool:
        return True

    def column_parallel_layer_norm_linear(self) -> type:
        return CpuNormColumnParallelLinear

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        return CpuRMSNorm

    def core_attention(self) -> type:
        return CpuAttention

    def grouped_mlp_modules(self, *_: Any) -> Any:
        raise NotImplementedError("mixtures of experts have no CPU layers")

    def activation_func(self) -> Any:
        return None
