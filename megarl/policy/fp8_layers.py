"""Which layers of a model compute in FP8 on the CPU, and the state of their scaling over a run.

The linear layers of decoder layers do: query, key, value and output projections, MLPs, experts, shared experts. The
embedding, the output layer, norms, routers, gates of shared experts and the attention between its projections stay in
the type of weights, as in Transformer Engine, whose own layers do all this on a GPU (`megarl.policy.megatron_config`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel

from megarl.config.fp8 import layers_in_fp8
from megarl.config.schema import RunConfig
from megarl.ops import fp8
from megarl.policy.cpu_layers import CpuColumnParallelLinear, CpuGroupedLinear, CpuRowParallelLinear
from megarl.policy.fp8_linear import AmaxHistory, Fp8Scaling


def use_fp8(chunks: Iterable[GPTModel], config: RunConfig, num_layers: int) -> None:
    """Have the layers of `chunks` compute by `config.precision`; nothing where it is not FP8. `num_layers` are the
    whole model's.

    Transformer Engine reduces amaxes of delayed scaling over all ranks of a pipeline stage, whatever experts they
    hold, so that an expert shares its factors with those in its place on other ranks. Here each expert has its own,
    the same under every layout.
    """
    if not config.uses_fp8:
        return
    groups: Any = parallel_state
    dense = groups.get_tensor_model_parallel_group(), groups.get_data_parallel_group(with_context_parallel=True)
    sparse = groups.get_expert_tensor_parallel_group(), groups.get_expert_data_parallel_group()
    fp8_layers = layers_in_fp8(config.fp8, num_layers)
    for chunk in chunks:
        layers: Any = chunk.decoder.layers
        for layer in layers:
            # Megatron counts layers from 1, over the whole model.
            if layer.layer_number - 1 not in fp8_layers:
                continue
            for module in layer.modules():
                if isinstance(module, CpuColumnParallelLinear | CpuRowParallelLinear):
                    module.scaling = _scaling(config, *dense)
                elif isinstance(module, CpuGroupedLinear):
                    for index in range(module.num_gemms):
                        module.add_module(f"scaling{index}", _scaling(config, *sparse))


def _scaling(config: RunConfig, shards: Any, copies: Any) -> Fp8Scaling:
    settings, history = config.fp8, None
    if fp8.RECIPES[config.precision].delayed:
        history = AmaxHistory(settings.amax_history_len, settings.amax_compute_algo, settings.margin)
    return Fp8Scaling(config.precision, shards, history, copies)


@torch.no_grad()
def round_weights(chunks: Iterable[GPTModel]) -> None:
    """Give every weight that is multiplied in FP8, by tiles, the values of its FP8 form. Those it keeps: they are exact
    in bf16, and of a tile of them the scale is the same again or smaller."""
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, CpuColumnParallelLinear | CpuRowParallelLinear) and module.scaling is not None:
                _round(module.get_parameter("weight"))
            elif isinstance(module, CpuGroupedLinear):
                for index in range(module.num_gemms):
                    if f"scaling{index}" in module._modules:
                        _round(module.get_parameter(f"weight{index}"))


def _round(weight: torch.Tensor) -> None:
    weight.copy_(fp8.quantise_tiles(weight, fp8.WEIGHT_TILE).dequantised())
