"""Megatron-core layers for the CPU, with the parameter names of Transformer Engine's layers.

Megatron's own local layers refuse sequence parallelism in norms and packed sequences in attention, and
name parameters differently from the Transformer Engine spec. These do neither, so that a checkpoint
and a layout are the same with and without Transformer Engine.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.moe.experts import GroupedMLPSubmodules, TEGroupedMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from megarl.config.fp8 import MULTIPLE
from megarl.policy.cpu_attention import CpuAttention
from megarl.policy.fp8_linear import Fp8Scaling, fp8_linear


class CpuRMSNorm(torch.nn.Module):
    """RMSNorm over the last dimension, in the parameter name (`weight`) of Transformer Engine's."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        _mark_for_sequence_parallel(self.weight, config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class _Scaled(torch.nn.Module):
    """Beside one of Megatron's linear layers: how it becomes FP8, None where it does not."""

    scaling: Fp8Scaling | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.scaling = None


class CpuColumnParallelLinear(_Scaled, ColumnParallelLinear):
    """Megatron's, in FP8 where it has a `scaling`."""

    def _forward_impl(self, input: torch.Tensor, weight: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if self.scaling is None:
            return super()._forward_impl(input, weight, **kwargs)
        if kwargs["sequence_parallel"]:
            input = gather_from_sequence_parallel_region(input, group=self.tp_group)
        elif kwargs["allreduce_dgrad"]:
            input = copy_to_tensor_model_parallel_region(input, group=self.tp_group)
        return fp8_linear(input, weight, kwargs["bias"], self.scaling)


class CpuRowParallelLinear(_Scaled, RowParallelLinear):
    """Megatron's, in FP8 where it has a `scaling`."""

    def _forward_impl(self, input: torch.Tensor, weight: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        # Megatron reduces over ranks, and adds the bias, afterwards.
        if self.scaling is None:
            return super()._forward_impl(input, weight, **kwargs)
        return fp8_linear(input, weight, None, self.scaling)


class CpuNormColumnParallelLinear(CpuColumnParallelLinear):
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


class CpuGroupedLinear(torch.nn.Module):
    """The linear layers of this rank's experts, in Transformer Engine's parameter names: `weight0`, `weight1`, ...

    `split_dimension` of the weights is what expert tensor parallelism splits: 0 for a column-parallel, 1 for a
    row-parallel layer. The dispatcher of the tokens sees to what ranks exchange. In FP8 where experts have a scaling,
    `scaling0`, `scaling1`, ...: each its own, of as many tokens as it has, padded with zeros.
    """

    split_dimension: int

    def __init__(
        self,
        num_gemms: int,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        **_: Any,
    ) -> None:
        super().__init__()
        self.num_gemms, self.groups = num_gemms, pg_collection
        sizes = [output_size, input_size]
        sizes[self.split_dimension] //= pg_collection.expt_tp.size()
        for index in range(num_gemms):
            weight = torch.nn.Parameter(torch.empty(sizes, dtype=config.params_dtype))
            self.register_parameter(f"weight{index}", weight)

    def forward(self, x: torch.Tensor, m_splits: list[int]) -> tuple[torch.Tensor, None]:
        """x (T, in), the first m_splits[0] rows for the first expert, and so on -> (T, out)."""
        parts = x.split(m_splits)
        assert len(parts) == self.num_gemms
        return torch.cat([self._product(part, index) for index, part in enumerate(parts)]), None

    def _product(self, x: torch.Tensor, index: int) -> torch.Tensor:
        weight, scaling = getattr(self, f"weight{index}"), self._modules.get(f"scaling{index}")
        if not isinstance(scaling, Fp8Scaling):
            return F.linear(x, weight)
        padded = F.pad(x, (0, 0, 0, -len(x) % MULTIPLE))
        return fp8_linear(padded, weight, None, scaling)[: len(x)]

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """Every expert as one of all experts' along a leading dimension, each split as its layer is."""
        experts = self.groups.ep.size() * self.num_gemms
        found: dict[str, Any] = {}
        for index in range(self.num_gemms):
            expert = self.groups.ep.rank() * self.num_gemms + index
            own = {"weight": getattr(self, f"weight{index}")}
            scaling = self._modules.get(f"scaling{index}")
            if scaling is not None:
                own |= {f"scaling.{name}": state for name, state in scaling.named_buffers()}
            shards = make_sharded_tensors_for_checkpoint(
                own,
                prefix,
                {"weight": self.split_dimension},
                (*sharded_offsets, (len(sharded_offsets), expert, experts)),
                tp_group=self.groups.expt_tp,
                dp_cp_group=metadata["dp_cp_group"],
            )
            for name, shard in zip(own, shards.values(), strict=True):
                shard.replica_id = (*shard.replica_id[:2], self.groups.expt_dp.rank())
                part, _, state = name.partition(".")
                found[f"{prefix}{part}{index}{'.' if state else ''}{state}"] = shard
        return found


class CpuColumnGroupedLinear(CpuGroupedLinear):
    """Split along the output dimension."""

    split_dimension = 0


class CpuRowGroupedLinear(CpuGroupedLinear):
    """Split along the input dimension; the outputs of all ranks are to be added up."""

    split_dimension = 1


class CpuSpecProvider(BackendSpecProvider):
    """The modules Megatron's spec builders are to use on the CPU."""

    def column_parallel_linear(self) -> type:
        return CpuColumnParallelLinear

    def row_parallel_linear(self) -> type:
        return CpuRowParallelLinear

    def fuse_layernorm_and_linear(self) -> bool:
        return True

    def column_parallel_layer_norm_linear(self) -> type:
        return CpuNormColumnParallelLinear

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False) -> type:
        return CpuRMSNorm

    def core_attention(self) -> type:
        return CpuAttention

    def grouped_mlp_modules(self, *_: Any) -> Any:
        layers: dict[str, Any] = {"linear_fc1": CpuColumnGroupedLinear, "linear_fc2": CpuRowGroupedLinear}
        return partial(TEGroupedMLP, submodules=GroupedMLPSubmodules(**layers))

    def activation_func(self) -> Any:
        return None
