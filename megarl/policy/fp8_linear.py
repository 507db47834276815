"""A linear layer in FP8 on the CPU, by Transformer Engine's recipes: `megarl.ops.fp8` in both passes.

Three products of quantised matrices, with tokens T, inputs K, outputs N:

    outputs (T, N)            inputs (T, K)           x weight (N, K)
    inputs' gradient (T, K)   outputs' gradient (T, N) x weight transposed (K, N)
    weight's gradient (N, K)  outputs' gradient transposed (N, T) x inputs transposed (K, T)

Each is summed over the columns of both. With one scale per matrix a transposed matrix has the same FP8 values. With
tiles, inputs and gradients are quantised twice, from the unquantised matrix: along their rows for the one product,
along the tokens for the other; a weight's square tiles serve both. Rows of zeros, as padding is, change no amax, no
scale and no sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.autograd.function import Function, once_differentiable

from megarl.ops import fp8
from megarl.ops.fp8 import E4M3, RECIPES, ROW_TILE, TOKEN_MULTIPLE, WEIGHT_TILE, AmaxChoice, Quantised

Role = Literal["input", "weight", "gradient"]
#: Where each has its column in histories and factors.
ROLES: tuple[Role, ...] = ("input", "weight", "gradient")


@dataclass(frozen=True)
class AmaxHistory:
    """How delayed scaling chooses factors."""

    length: int
    """Steps whose amax is kept."""
    choice: AmaxChoice
    """The largest of the history, or the newest."""
    margin: float = 0.0
    """Powers of two that stay free above the amax."""


class Fp8Scaling(torch.nn.Module):
    """How one linear layer's inputs, weight and outputs' gradients become FP8.

    A whole matrix's factor is that of all ranks' parts: under current scaling the amax is reduced over `group` with
    each matrix, so all ranks of it must compute the layer together. Transformer Engine 2.11 reduces there the inputs of
    a column-parallel and the gradients of a row-parallel layer alone, and only under sequence parallelism: its weights
    have a factor for each rank's shard. Under delayed scaling nothing is exchanged but in `update`.

    Under delayed scaling the state is part of the module's: `history` (length, 3) and `factors` (3,) fp32, by `ROLES`.
    After `update` it is the same on all ranks of the group.
    """

    history: torch.Tensor
    factors: torch.Tensor

    def __init__(
        self, recipe: str, group: dist.ProcessGroup | None = None, amax_history: AmaxHistory | None = None
    ) -> None:
        """Args:
        recipe: a name in `megarl.ops.fp8.RECIPES`.
        group: ranks that hold parts of the layer's matrices; None: this one alone.
        amax_history: for a delayed recipe, and for no other.
        """
        super().__init__()
        self.recipe, self.group, self.amax_history = RECIPES[recipe], group, amax_history
        if self.recipe.delayed != (amax_history is not None):
            raise ValueError(
                f"{recipe} with amax_history={amax_history}. Fix: give one for fp8-delayed, and only there"
            )
        if amax_history is not None:
            self.register_buffer("history", torch.zeros(amax_history.length, len(ROLES)))
            self.register_buffer("factors", torch.ones(len(ROLES)))

    def kind_of(self, role: Role) -> torch.dtype:
        """The format of the inputs, the weight or the outputs' gradients."""
        return self.recipe.gradients if role == "gradient" else E4M3

    def quantised(self, x: torch.Tensor, role: Role, record: bool) -> tuple[Quantised, Quantised]:
        """A matrix (M, K) and its transpose (K, M), each to be summed over its columns.

        Under delayed scaling with the factor of earlier steps; its amax is recorded for later ones, if `record`.
        """
        kind = self.kind_of(role)
        if self.recipe.tiles:
            if role == "weight":
                whole = fp8.quantise_tiles(x, WEIGHT_TILE, kind=kind)
                return whole, whole.transposed()
            return fp8.quantise_tiles(x, ROW_TILE, kind=kind), fp8.quantise_tiles(x.T, ROW_TILE, kind=kind)
        amax = fp8.whole_amax(x)
        if self.recipe.delayed:
            index = ROLES.index(role)
            if record:
                self.history[0, index] = torch.maximum(self.history[0, index], amax)
            # A copy: what the backward pass keeps must not change with the next step.
            factor = self.factors[index].clone()
        else:
            factor = fp8.amax_factor(_largest(amax, self.group), kind)
        whole = fp8.quantise_whole(x, factor, kind)
        return whole, whole.transposed()

    @torch.no_grad()
    def update(self) -> None:
        """The end of a step under delayed scaling: what was recorded since the last one, of all ranks of `group`, goes
        into history and factors. Nothing under other recipes.

        All ranks of `group` at once, and not between a forward pass and its backward pass or recomputation, which are
        to find the same factors.
        """
        if self.amax_history is None:
            return
        recorded = _largest(self.history[0].clone(), self.group)
        for index, role in enumerate(ROLES):
            history, factors = fp8.updated_scaling(
                self.history[:, index, None],
                recorded[index, None],
                self.factors[index, None],
                self.kind_of(role),
                self.amax_history.margin,
                self.amax_history.choice,
            )
            self.history[:, index], self.factors[index] = history[:, 0], factors[0]


def fp8_linear(
    inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, scaling: Fp8Scaling
) -> torch.Tensor:
    """inputs x weight transposed + bias in FP8, of any number of leading dimensions, in the inputs' dtype.

    Sums and bias are fp32. Gradients are in the dtypes of what they are of; the bias's is that of the unquantised
    gradient, as in Transformer Engine. Amaxes are recorded where gradients are enabled, so that log-probs
    which are only measured change no state; under recomputation that is the second time.

    Args:
        inputs: (..., K), in all a multiple of 16 tokens (0 too).
        weight: (N, K).
        bias: (N,), or None.

    Raises:
        ValueError: another number of tokens; the caller pads, with zeros.
    """
    tokens = inputs.numel() // inputs.shape[-1]
    if tokens % TOKEN_MULTIPLE:
        raise ValueError(
            f"{tokens} tokens in an FP8 product: must be a multiple of {TOKEN_MULTIPLE}. Fix: pad them with zeros"
        )
    flat = inputs.reshape(tokens, inputs.shape[-1])
    outputs = _Fp8Linear.apply(flat, weight, bias, scaling, torch.is_grad_enabled())
    return outputs.view(*inputs.shape[:-1], len(weight))


class _Fp8Linear(Function):
    @staticmethod
    def forward(
        ctx: Any,
        inputs: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        scaling: Fp8Scaling,
        record: bool,
    ) -> torch.Tensor:
        rows, columns = scaling.quantised(inputs, "input", record)
        outwards, inwards = scaling.quantised(weight, "weight", record)
        outputs = fp8.product(rows, outwards)
        if bias is not None:
            outputs += bias
        # A byte per number, which is all that the backward pass needs.
        ctx.save_for_backward(columns.values, columns.scales, inwards.values, inwards.scales)
        ctx.tiles = columns.tile, inwards.tile
        ctx.scaling, ctx.dtypes = scaling, (inputs.dtype, weight.dtype, None if bias is None else bias.dtype)
        return outputs.to(inputs.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        column_values, column_scales, inward_values, inward_scales = ctx.saved_tensors
        rows, columns = ctx.scaling.quantised(gradient, "gradient", True)
        of_inputs = of_weight = of_bias = None
        input_dtype, weight_dtype, bias_dtype = ctx.dtypes
        if ctx.needs_input_grad[0]:
            of_inputs = fp8.product(rows, Quantised(inward_values, inward_scales, ctx.tiles[1])).to(input_dtype)
        if ctx.needs_input_grad[1]:
            of_weight = fp8.product(columns, Quantised(column_values, column_scales, ctx.tiles[0])).to(weight_dtype)
        if ctx.needs_input_grad[2]:
            of_bias = gradient.float().sum(0).to(bias_dtype)
        return of_inputs, of_weight, of_bias, None, None


def _largest(amax: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Of all ranks of the group; `amax` is overwritten."""
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(amax, dist.ReduceOp.MAX, group=group)
    return amax
