"""Transformer Engine's FP8 on a GPU beside what stands for it on the CPU: `ops.fp8` and `policy.fp8_linear`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megarl.ops import fp8
from megarl.policy.fp8_linear import AmaxHistory, Fp8Scaling, end_step, fp8_linear

TOKENS, INPUTS, OUTPUTS = 96, 384, 256
STEPS, HISTORY = 4, 3


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double().cpu() - expected.double()).norm() / expected.double().norm())


def test_weights_have_the_same_bits() -> None:
    import transformer_engine_torch as tex  # pyright: ignore[reportMissingImports]
    from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    weight = torch.randn(300, 400) * torch.logspace(-6, 2, 400)
    weight[:128, :128] = 0
    weight[130, 5] = torch.finfo(torch.bfloat16).tiny / 4
    weight = weight.bfloat16()
    quantizer = Float8BlockQuantizer(
        tex.DType.kFloat8E4M3, rowwise=True, columnwise=False, force_pow_2_scales=True, block_scaling_dim=2
    )
    found: Any = quantizer(weight.cuda())
    expected = fp8.quantise_tiles(weight, fp8.WEIGHT_TILE)
    rows, columns = expected.scales.shape
    assert torch.equal(found._rowwise_scale_inv.cpu()[:rows, :columns], expected.scales)
    assert torch.equal(found._rowwise_data.cpu(), expected.values.view(torch.uint8))


def recipe_of(name: str) -> Any:
    from transformer_engine.common import recipe  # pyright: ignore[reportMissingImports]

    return {
        "fp8-tensorwise": recipe.Float8CurrentScaling,
        "fp8-delayed": lambda: recipe.DelayedScaling(amax_history_len=HISTORY, amax_compute_algo="max"),
        "fp8-blockwise": recipe.Float8BlockScaling,
    }[name]()


@pytest.mark.parametrize("name", fp8.RECIPES)
def test_a_layer_computes_what_its_emulation_computes(name: str, figure) -> None:
    """Outputs and both gradients, step after step: nearer to the emulation than a third of what FP8 itself costs."""
    import transformer_engine.pytorch as te  # pyright: ignore[reportMissingImports]

    torch.manual_seed(1)
    layer = te.Linear(INPUTS, OUTPUTS, bias=False, params_dtype=torch.bfloat16, device="cuda")
    weight = layer.weight.detach().cpu().requires_grad_()
    history = AmaxHistory(HISTORY, "max") if fp8.RECIPES[name].delayed else None
    scaling = Fp8Scaling(name, amax_history=history)
    worst: dict[str, float] = {}
    for step in range(STEPS):
        inputs = (torch.randn(TOKENS, INPUTS) * 2.0**step).bfloat16().requires_grad_()
        gradient = (torch.randn(TOKENS, OUTPUTS) / 2.0**step).bfloat16()
        on_gpu = inputs.detach().cuda().requires_grad_()
        layer.weight.grad = weight.grad = None
        with te.autocast(enabled=True, recipe=recipe_of(name)):
            found = layer(on_gpu)
        found.backward(gradient.cuda())
        outputs = fp8_linear(inputs, weight, None, scaling)
        outputs.backward(gradient)
        end_step([scaling])
        exact_weight, exact_inputs = weight.detach().double(), inputs.detach().double()
        triples = {
            "outputs": (found, outputs, exact_inputs @ exact_weight.T),
            "inputs' gradient": (on_gpu.grad, inputs.grad, gradient.double() @ exact_weight),
            "weight's gradient": (layer.weight.grad, weight.grad, gradient.double().T @ exact_inputs),
        }
        for what, (theirs, ours, exact) in triples.items():
            assert theirs is not None and ours is not None
            cost = relative(ours.detach(), exact)
            apart = relative(theirs.detach(), ours.detach())
            worst[what] = max(worst.get(what, 0.0), apart / cost)
            assert apart < cost / 3, f"step {step}, {what}: {apart:.2e} apart, where FP8 costs {cost:.2e}"
    figure(f"{name}: layer beside its emulation, part of FP8's error", max(worst.values()), "", "< 0.33")
