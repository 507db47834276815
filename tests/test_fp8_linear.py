"""The linear layer in FP8: its three products, padding, what delayed scaling remembers, and tensor-parallel shards."""

from __future__ import annotations

import math

import parity
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from megarl.ops import fp8
from megarl.ops.fp8 import E4M3, E5M2, RECIPES, ROW_TILE, WEIGHT_TILE
from megarl.policy.fp8_linear import AmaxHistory, Fp8Scaling, end_step, fp8_linear

TOKENS, INPUTS, OUTPUTS = 48, 512, 256
NEWEST = AmaxHistory(length=1, choice="most_recent")

Found = dict[str, torch.Tensor]
#: Inputs, a weight, and the outputs' gradient.
Matrices = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def scaling_of(recipe: str, group=None, history: AmaxHistory = NEWEST) -> Fp8Scaling:
    return Fp8Scaling(recipe, group, history if RECIPES[recipe].delayed else None)


def matrices(seed: int = 0, tokens: int = TOKENS) -> Matrices:
    """Of sizes such as training has."""
    drawn = torch.Generator().manual_seed(seed)
    inputs = torch.randn(tokens, INPUTS, generator=drawn)
    weight = torch.randn(OUTPUTS, INPUTS, generator=drawn) * 0.02
    return inputs, weight, torch.randn(tokens, OUTPUTS, generator=drawn) * 1e-4


def passed(inputs: torch.Tensor, weight: torch.Tensor, gradient: torch.Tensor, scaling: Fp8Scaling | None) -> Found:
    """Outputs and gradients, in FP8 or, without a scaling, in the matrices' own dtype."""
    inputs, weight = inputs.clone().requires_grad_(), weight.clone().requires_grad_()
    outputs = F.linear(inputs, weight) if scaling is None else fp8_linear(inputs, weight, None, scaling)
    of_inputs, of_weight = torch.autograd.grad(outputs, (inputs, weight), gradient)
    return {"outputs": outputs.detach(), "of inputs": of_inputs, "of weight": of_weight}


def settled(recipe: str, known: Matrices, group=None) -> Fp8Scaling:
    """A scaling; under the delayed recipe one that has seen these matrices in the step before."""
    scaling = scaling_of(recipe, group)
    if scaling.recipe.delayed:
        passed(*known, scaling)
        end_step([scaling])
    return scaling


@pytest.mark.parametrize("recipe", RECIPES)
def test_error_against_the_plain_product_is_that_of_rounding(recipe):
    """Of each operand at most u / sqrt(3) in the root mean square, u as in `fp8.ROUNDING`; of both the root of the
    squares' sum (`test_ops_fp8.py` has why). At least a third of it: it is FP8 that was computed.
    """
    inputs, weight, gradient = (one.double() for one in matrices())
    plain = passed(inputs, weight, gradient, None)
    found = passed(*matrices(), settled(recipe, matrices()))
    of_gradient = fp8.ROUNDING[RECIPES[recipe].gradients]
    for name, other in [("outputs", fp8.ROUNDING[E4M3]), ("of inputs", of_gradient), ("of weight", of_gradient)]:
        bound = math.sqrt((fp8.ROUNDING[E4M3] ** 2 + other**2) / 3)
        error = float((found[name].double() - plain[name]).norm() / plain[name].norm())
        assert bound / 3 < error < bound, name


def test_products_are_of_the_matrices_quantised_for_them():
    inputs, weight, gradient = matrices(1)
    found = passed(inputs, weight, gradient, scaling_of("fp8-blockwise"))
    rows, square = fp8.quantise_tiles(inputs, ROW_TILE), fp8.quantise_tiles(weight, WEIGHT_TILE)
    assert found["outputs"].equal(fp8.product(rows, square))
    assert found["of inputs"].equal(fp8.product(fp8.quantise_tiles(gradient, ROW_TILE), square.transposed()))
    along_tokens = [fp8.quantise_tiles(one.T, ROW_TILE) for one in (gradient, inputs)]
    assert found["of weight"].equal(fp8.product(*along_tokens))

    found = passed(inputs, weight, gradient, scaling_of("fp8-tensorwise"))
    x, w, g = (
        (one * (fp8.LARGEST[kind] / one.abs().max())).to(kind).double() * (one.abs().max().double() / fp8.LARGEST[kind])
        for one, kind in [(inputs, E4M3), (weight, E4M3), (gradient, E5M2)]
    )
    for name, expected in [("outputs", x @ w.T), ("of inputs", g @ w), ("of weight", g.T @ x)]:
        # But for a number whose scaled value lies within fp32's rounding of the middle between two of FP8's.
        assert float((found[name] - expected).norm() / expected.norm()) < 1e-4, name


@pytest.mark.parametrize("recipe", RECIPES)
def test_zeros_as_padding_change_nothing(recipe):
    known = matrices(2)
    padded = F.pad(known[0], (0, 0, 0, 96)), known[1], F.pad(known[2], (0, 0, 0, 96))
    short, long = (passed(*one, settled(recipe, one)) for one in (known, padded))
    assert (long["outputs"][TOKENS:] == 0).all() and (long["of inputs"][TOKENS:] == 0).all()
    for name, found in short.items():
        # To fp32's rounding: the library sums in an order of its own for each size.
        assert torch.allclose(long[name][: len(found)], found, rtol=1e-5, atol=1e-6 * float(found.abs().max())), name


def test_leading_dimensions_bias_and_dtypes():
    inputs, weight, gradient = (one.bfloat16() for one in matrices(3))
    bias = torch.linspace(-1, 1, OUTPUTS, requires_grad=True)
    shaped = inputs.view(TOKENS // 2, 2, INPUTS).requires_grad_()
    outputs = fp8_linear(shaped, weight, bias, scaling_of("fp8-blockwise"))
    assert outputs.shape == (TOKENS // 2, 2, OUTPUTS) and outputs.dtype == torch.bfloat16
    exact = fp8.product(fp8.quantise_tiles(inputs, ROW_TILE), fp8.quantise_tiles(weight, WEIGHT_TILE)) + bias
    assert outputs.view(TOKENS, OUTPUTS).equal(exact.bfloat16())
    of_inputs, of_bias = torch.autograd.grad(outputs, (shaped, bias), gradient.view_as(outputs))
    assert of_inputs.dtype == torch.bfloat16 and of_inputs.shape == shaped.shape
    assert of_bias.equal(gradient.float().sum(0))


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_tokens_at_all(recipe):
    found = passed(*matrices(tokens=0), scaling_of(recipe))
    assert found["outputs"].shape == (0, OUTPUTS) and (found["of weight"] == 0).all()


def test_refusals():
    inputs, weight, _ = matrices()
    with pytest.raises(ValueError, match=r"40 tokens in an FP8 product: must be a multiple of 16\. Fix: pad"):
        fp8_linear(inputs[:40], weight, None, scaling_of("fp8-tensorwise"))
    with pytest.raises(ValueError, match="give one for fp8-delayed"):
        Fp8Scaling("fp8-delayed")
    with pytest.raises(ValueError, match="give one for fp8-delayed"):
        Fp8Scaling("fp8-blockwise", amax_history=NEWEST)


def test_delayed_scaling_takes_its_factors_from_the_steps_before():
    scaling = scaling_of("fp8-delayed", history=AmaxHistory(length=3, choice="max", margin=1))
    assert scaling.factors.tolist() == [1.0, 1.0, 1.0]
    first, second = matrices(4), matrices(5)
    unscaled = passed(*first, scaling)
    x, w = (fp8.saturating_cast(one, E4M3).double() for one in first[:2])
    assert torch.allclose(unscaled["outputs"].double(), x @ w.T, rtol=1e-4, atol=1e-5)
    passed(*second, scaling)  # another micro-batch of the step
    largest = [max(float(a.abs().max()), float(b.abs().max())) for a, b in zip(first, second, strict=True)]
    assert scaling.history[0].tolist() == largest and scaling.factors.tolist() == [1.0, 1.0, 1.0]
    end_step([scaling])
    most = torch.tensor([448.0, 448.0, 57344.0]) / 2
    assert scaling.factors.equal(most / torch.tensor(largest))
    assert scaling.history[:, 0].tolist() == [0.0, 0.0, largest[0]]
    end_step([scaling])
    assert scaling.history[:, 0].tolist() == [0.0, 0.0, largest[0]]


def test_measuring_records_nothing_and_recomputation_finds_the_same():
    inputs, weight, gradient = matrices(6)
    plain, again = (settled("fp8-delayed", (inputs / 2, weight, gradient)) for _ in range(2))
    with torch.no_grad():
        fp8_linear(inputs * 9, weight, None, plain)
    assert plain.history[0].tolist() == [0.0, 0.0, 0.0]
    found = passed(inputs, weight, gradient, plain)
    leaves = inputs.clone().requires_grad_(), weight.clone().requires_grad_()
    outputs = checkpoint(fp8_linear, *leaves, None, again, use_reentrant=True)
    torch.autograd.backward(outputs, gradient)
    for leaf, name in zip(leaves, ("of inputs", "of weight"), strict=True):
        assert leaf.grad is not None and leaf.grad.equal(found[name])
    assert again.history.equal(plain.history) and plain.history[0].tolist() != [0.0, 0.0, 0.0]


def test_delayed_scaling_goes_on_from_its_state():
    history = AmaxHistory(length=4, choice="max")
    steps = [matrices(seed) for seed in range(7, 11)]
    whole, resumed = scaling_of("fp8-delayed", history=history), scaling_of("fp8-delayed", history=history)
    for step in steps[:2]:
        passed(*step, whole)
        end_step([whole])
    resumed.load_state_dict({name: value.clone() for name, value in whole.state_dict().items()})
    for step in steps[2:]:
        found = [passed(*step, one) for one in (whole, resumed)]
        assert all(found[0][name].equal(found[1][name]) for name in found[0])
        end_step([whole])
        end_step([resumed])
    assert whole.history.equal(resumed.history) and whole.factors.equal(resumed.factors)
    assert not scaling_of("fp8-blockwise").state_dict()


def sharded(_world, recipe: str, split: str) -> Found:
    """This rank's outputs, gradients and state of a layer split along its outputs (column) or its inputs (row)."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    inputs, weight, gradient = spiked()
    if split == "column":
        weight, gradient = weight.chunk(ranks)[rank], gradient.chunk(ranks, 1)[rank]
    else:
        inputs, weight = inputs.chunk(ranks, 1)[rank], weight.chunk(ranks, 1)[rank]
    scaling = settled(recipe, (inputs, weight, gradient), dist.group.WORLD)
    found = passed(inputs, weight, gradient, scaling)
    end_step([scaling])
    return found | dict(scaling.named_buffers())


def spiked() -> Matrices:
    """Matrices whose largest numbers are the first rank's alone, so that a factor of a shard's own amax differs."""
    inputs, weight, gradient = matrices(12)
    inputs[0, 0], weight[0, 0], gradient[0, 0] = 7.0, 0.13, 9e-4
    return inputs, weight, gradient


def all_sharded(world) -> dict[tuple[str, str], Found]:
    return {(recipe, split): sharded(world, recipe, split) for recipe in RECIPES for split in ("column", "row")}


@pytest.mark.processes
def test_shards_are_scaled_as_the_whole():
    first, second = parity.run_world("test_fp8_linear", "all_sharded", 2)
    for recipe in RECIPES:
        scaling = settled(recipe, spiked())
        whole = passed(*spiked(), scaling)
        end_step([scaling])
        for split, (outputs, of_inputs, of_weight) in {"column": (1, None, 0), "row": (None, 1, 1)}.items():
            of_ranks = [ranks[recipe, split] for ranks in (first, second)]
            for name, side in [("outputs", outputs), ("of inputs", of_inputs), ("of weight", of_weight)]:
                parts = [one[name] for one in of_ranks]
                found = parts[0] + parts[1] if side is None else torch.cat(parts, side)
                near = 1e-6 * float(whole[name].abs().max())
                assert torch.allclose(found, whole[name], rtol=1e-5, atol=near), (recipe, split, name)
            for name, state in scaling.named_buffers():
                assert all(one[name].equal(state) for one in of_ranks), (recipe, split, name)
