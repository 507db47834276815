"""The experts of a layer in vLLM: how they are packed, and how packed ones are read.

vLLM holds the experts of a layer in two stacks: `w13_weight` (experts, 2 * width, hidden), on each rank its
share of the gate projection and then its share of the up projection, and `w2_weight` (experts, hidden,
width), with `width` the rank's share of an expert's size. All experts are on every rank; with expert
parallelism only its share of them, each whole.
After loading, a backend may pad and reorder the stacks. The CPU's does so only while it builds its kernel,
once; Triton's never does.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any, cast

import torch
from torch import nn

#: The parameters of a layer's experts.
STACKS = ("w13_weight", "w2_weight")

#: Backends whose kernels read the stacks as they were loaded, by vLLM's names.
_AS_LOADED = ("TRITON", "BATCHED_TRITON")


def are_packed(module: nn.Module) -> bool:
    """Whether `module` holds the experts of a layer, in another order than a checkpoint loader leaves them in."""
    # Experts in FP8 are built for backends that keep them.
    backend = getattr(_method(module), "unquantized_backend", None) if hasattr(module, STACKS[0]) else None
    return backend is not None and backend.name not in _AS_LOADED


def pack(module: nn.Module, staged: dict[str, torch.Tensor]) -> None:
    """Fill the experts from both stacks in the shapes they are loaded in; `staged` is freed.

    The packed stacks go into the memory of the old ones, whose addresses captured CUDA graphs know.
    """
    live: dict[str, nn.Parameter] = {name: getattr(module, name) for name in STACKS}
    for name in STACKS:
        setattr(module, name, nn.Parameter(staged.pop(name), requires_grad=False))
    method = _method(module)
    with torch.no_grad():
        method.process_weights_after_loading(module)
        if _on_cpu(module):
            # What the method itself calls only when it builds the kernel.
            method.moe_kernel.fused_experts.process_weights_after_loading(module)
        for name in STACKS:
            live[name].copy_(getattr(module, name))
            setattr(module, name, live[name])


def unpack(module: nn.Module) -> dict[str, torch.Tensor]:
    """Both stacks in the order and the shapes they are loaded in; on a GPU as they are.

    A kernel that multiplies experts cannot return a weight, so vLLM's packing is applied to numbered elements to
    learn its order.
    """
    stacks = {name: getattr(module, name).detach().clone() for name in STACKS}
    if not _on_cpu(module):
        return stacks
    layer = cast("Any", module)
    kernel = _method(module).moe_kernel.fused_experts
    width, hidden = layer.moe_config.intermediate_size_per_partition, layer.moe_config.hidden_dim
    w13, w2 = (_in_loaded_order(stacks[name], kernel.isa) for name in STACKS)
    experts = w13.shape[0]
    return {
        "w13_weight": w13.view(experts, 2, -1, hidden)[:, :, :width].reshape(experts, 2 * width, hidden),
        "w2_weight": w2[..., :width].contiguous(),
    }


def number_locally() -> None:
    """Make the CPU's experts keep to those of their rank under expert parallelism; idempotent.

    vLLM 0.32's CPU kernel takes the numbers of experts over the whole model for those in the rank's own stack, and
    reads past its end. Here experts of other ranks become the first of the own, with weight 0: ranks are added up.
    """
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    kernel = CPUUnquantizedExperts.apply
    if hasattr(kernel, "__wrapped__"):
        return

    @functools.wraps(kernel)
    def apply(self: Any, *given: Any, **named: Any) -> None:
        call = signature.bind(self, *given, **named)
        numbers, of_rank = call.arguments["topk_ids"], call.arguments["expert_map"]
        if of_rank is not None:
            own = of_rank[numbers.long()].to(numbers.dtype)
            call.arguments["topk_weights"] = call.arguments["topk_weights"] * (own >= 0)
            call.arguments["topk_ids"] = own.clamp(min=0)
        kernel(*call.args, **call.kwargs)

    signature = inspect.signature(kernel)
    CPUUnquantizedExperts.apply = apply


def _in_loaded_order(packed: torch.Tensor, isa: str) -> torch.Tensor:
    """Undo the CPU backend's packing of `packed` (experts, rows, columns)."""
    from vllm._custom_ops import cpu_prepack_moe_weight

    size = packed[0].numel()
    numbers = torch.arange(size).view_as(packed[0])
    # Numbers of one byte are exact in every type; the bytes of an element's number stand in for experts.
    digits = torch.stack([(numbers >> shift) & 255 for shift in range(0, size.bit_length(), 8)])
    moved = cpu_prepack_moe_weight(digits.to(packed.dtype), isa).to(torch.int64).flatten(1)
    origin = torch.stack([digit << (8 * place) for place, digit in enumerate(moved)]).sum(0)
    loaded = torch.empty_like(packed).flatten(1)
    loaded[:, origin] = packed.flatten(1)
    return loaded.view_as(packed)


def _method(module: nn.Module) -> Any:
    return cast("Any", module).quant_method


def _on_cpu(module: nn.Module) -> bool:
    return _method(module).unquantized_backend.name == "CPU"
