"""FP8 engines on the CPU: vLLM's layers for FP8 blocks, computed with what their values stand for.

vLLM's own CPU kernels for FP8 blocks need AMX, keep weights in an order of their own, and leave activations as they
are. Here, whatever the processor, a layer holds the two tensors that it holds on a GPU, `weight` and `weight_scale_inv`
(of experts those of both stacks), with vLLM's shapes and loaders, and beside them the bf16 weights that they stand for,
exactly: 4 bits of mantissa times a power of two. Activations are quantised as vLLM 0.32 does before its kernels on
Hopper: rows of 128 elements, each with a power-of-two scale (DeepGEMM's E8M0, on by default there). What is left to the
GPU is the order of its sums, and that its tensor cores keep fewer bits while they add up.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import nn
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.fp8 import Fp8Config, Fp8MoEMethod
from vllm.model_executor.layers.quantization.utils import fp8_utils
from vllm.model_executor.layers.quantization.utils.quant_utils import is_layer_skipped
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.model_executor.parameter import BlockQuantScaleParameter

from megarl.config.quantisation import BLOCK
from megarl.errors import Refusal
from megarl.ops.fp8 import ROW_TILE, WEIGHT_TILE, Quantised, quantise_tiles


def register() -> None:
    """Have vLLM build its FP8 layers from the classes here. Idempotent."""
    register_quantization_config("fp8")(BlockConfig)


class BlockConfig(Fp8Config):
    """vLLM's configuration of FP8 checkpoints, with the layers here."""

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """See vLLM. Raises `Refusal` for a checkpoint with other scales than those of blocks."""
        if self.weight_block_size != [BLOCK, BLOCK]:
            raise Refusal(
                f"FP8 weights with weight_block_size={self.weight_block_size}",
                f"have no kernel on the CPU but in blocks of {BLOCK} x {BLOCK}",
                "use a checkpoint with such blocks",
            )
        if isinstance(layer, LinearBase):
            whole = is_layer_skipped(prefix, self.ignored_layers, self.packed_modules_mapping)
            return UnquantizedLinearMethod() if whole else BlockLinear()
        return BlockExperts(self, layer) if isinstance(layer, RoutedExperts) else None


class BlockLinear(LinearMethodBase):
    """A linear layer; `cpu_linear` is its product with the weights that the values stand for, packed by vLLM."""

    _BLOCK: ClassVar = [BLOCK, BLOCK]

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """The two tensors, with vLLM's own rule of what it can cut."""
        module, loader = cast("Any", layer), extra_weight_attrs.get("weight_loader")
        rows, sizes = sum(output_partition_sizes), (input_size_per_partition, output_partition_sizes)
        module.logical_widths, module.weight_block_size = output_partition_sizes, self._BLOCK
        module.input_size_per_partition, module.output_size_per_partition = input_size_per_partition, rows
        fp8_utils.validate_fp8_block_shape(layer, input_size, output_size, *sizes, self._BLOCK)
        layer.register_parameter(
            "weight", fp8_utils.create_fp8_weight_parameter(rows, input_size_per_partition, loader)
        )
        scales = fp8_utils.create_fp8_scale_parameter(
            cast("Any", BlockQuantScaleParameter), output_partition_sizes, input_size_per_partition, self._BLOCK, loader
        )
        layer.register_parameter("weight_scale_inv", scales)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Make the product anew from the two tensors."""
        module, dense = cast("Any", layer), cast("Any", nn.Module())
        dense.weight = nn.Parameter(_dense(module.weight, module.weight_scale_inv), requires_grad=False)
        dispatch_cpu_unquantized_gemm(dense, remove_weight=True)
        module.cpu_linear = lambda x: dense.cpu_linear(x, dense.weight, None)

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """As vLLM's kernel: the bias is added to the product's rounded result."""
        product = cast("Any", layer).cpu_linear(_rounded(x))
        return product if bias is None else product + bias


class BlockExperts(Fp8MoEMethod):
    """The experts of a layer, one after another; `cpu_linear` are the two stacks of weights that values stand for."""

    def __init__(self, config: BlockConfig, layer: RoutedExperts) -> None:
        # vLLM's own constructor looks for a kernel, of which there is none.
        FusedMoEMethodBase.__init__(self, layer.moe_config)
        self.quant_config, self.weight_block_size = config, config.weight_block_size
        self.block_quant, self.weight_scale_name = True, "weight_scale_inv"
        self.moe_block_shape, self.weight_scale_refine = self.weight_block_size, None
        if self.moe.activation != MoEActivation.SILU:
            raise Refusal(
                f"experts with the activation {self.moe.activation.value}",
                "have no FP8 kernel on the CPU, where it must be silu",
                "use another model, or rollout.precision=bf16",
            )

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Make the weights anew from values and scales."""
        module = cast("Any", layer)
        module.cpu_linear = tuple(
            torch.stack([_dense(*pair) for pair in zip(*stacks, strict=True)])
            for stacks in (
                (module.w13_weight, module.w13_weight_scale_inv),
                (module.w2_weight, module.w2_weight_scale_inv),
            )
        )

    def get_fused_moe_quant_config(self, layer: nn.Module) -> None:
        """None: no kernel of vLLM's asks."""

    def apply(
        self,
        layer: nn.Module,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        """(tokens, hidden): the sum over a token's experts of this rank, as Triton's kernel rounds: what goes into a
        product to FP8, what comes out of it to bf16, of the second once it is multiplied by the router's weight."""
        module = cast("Any", layer)
        w13, w2 = module.cpu_linear
        # Of other ranks' experts -1.
        experts = topk_ids if module.expert_map is None else module.expert_map[topk_ids.long()]
        tokens, total = _rounded(x), torch.zeros(x.shape, dtype=torch.float32)
        for expert in experts.unique().tolist():
            if expert < 0:
                continue
            rows, places = (experts == expert).nonzero(as_tuple=True)
            gate, up = F.linear(tokens[rows], w13[expert]).chunk(2, dim=-1)
            # Triton's kernel multiplies before it rounds.
            made = F.linear(_rounded(F.silu(gate) * up).float(), w2[expert].float())
            total.index_add_(0, rows, (made * topk_weights[rows, places, None]).to(x.dtype).float())
        return total.to(x.dtype)


def _dense(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """What the values of a matrix stand for, bf16."""
    return Quantised(values.detach(), scales.detach(), WEIGHT_TILE).dequantised().bfloat16()


def _rounded(x: torch.Tensor) -> torch.Tensor:
    """Activations (..., K) after they were quantised, in rows of 128 elements; exact in bf16."""
    flat = x.reshape(-1, x.shape[-1])
    return quantise_tiles(flat, ROW_TILE).dequantised().to(x.dtype).view(x.shape)
