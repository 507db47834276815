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

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.autograd.function import Function, once_differentiable

from megarl.config.fp8 import MULTIPLE
from megarl.ops import fp8
from megarl.ops.fp8 import COLUMN_TILE, E4M3, RECIPES, ROW_TILE, WEIGHT_TILE, AmaxChoice, Quantised

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
    have a factor for each rank's shard. Under delayed scaling nothing is exchanged but in `end_step`.

    Under delayed scaling the state is part of the module's: `history` (length, 3) and `factors` (3,) fp32, by `ROLES`.
    After `end_step` it is the same on all ranks of `group` and `copies`.
    """

    history: torch.Tensor
    factors: torch.Tensor

    def __init__(
        self,
        recipe: str,
        group: dist.ProcessGroup | None = None,
        amax_history: AmaxHistory | None = None,
        copies: dist.ProcessGroup | None = None,
    ) -> None:
        """Args:
        recipe: a name in `megarl.ops.fp8.RECIPES`.
        group: ranks that hold parts of the layer's matrices; None: this one alone.
        amax_history: for a delayed recipe, and for no other.
        copies: ranks with the same part of the weight, which see other tokens of the same step.
        """
        super().__init__()
        self.recipe, self.group, self.amax_history, self.copies = RECIPES[recipe], group, amax_history, copies
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
            along_rows = fp8.quantise_tiles(x, ROW_TILE, kind=kind)
            return along_rows, fp8.quantise_tiles(x, COLUMN_TILE, kind=kind).transposed()
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

    def forget(self) -> None:
        """Drop what was recorded since the last step."""
        if self.amax_history is not None:
            self.history[0] = 0.0

    def begin_anew(self) -> None:
        """Drop all that was recorded, and scale by 1 again."""
        if self.amax_history is not None:
            self.history.zero_()
            self.factors.fill_(1.0)


def scalings(modules: Iterable[torch.nn.Module]) -> list[Fp8Scaling]:
    """Those of all layers within, in the order of the forward pass."""
    return [one for module in modules for one in module.modules() if isinstance(one, Fp8Scaling)]


@torch.no_grad()
def end_step(scalings: Iterable[Fp8Scaling]) -> None:
    """The end of an optimizer step for layers of one recipe: under delayed scaling what they recorded since the last
    one, of all ranks, goes into their histories and factors. Nothing under other recipes.

    By all ranks of the layers' groups at once, with all their layers of these groups in one order, and not between a
    forward pass and its backward pass or recomputation, which are to find the same factors.
    """
    by_groups: dict[Any, list[Fp8Scaling]] = {}
    for one in scalings:
        if one.amax_history is not None:
            by_groups.setdefault((one.group, one.copies), []).append(one)
    for (group, copies), layers in by_groups.items():
        recorded = torch.stack([one.history[0] for one in layers])
        for row, one in zip(_largest(_largest(recorded, group), copies), layers, strict=True):
            _enter(one, row)


def _enter(scaling: Fp8Scaling, recorded: torch.Tensor) -> None:
    """Enter a step's amaxes, (3,), into history and factors."""
    settings = scaling.amax_history
    assert settings is not None
    for index, role in enumerate(ROLES):
        scaling.history[:, index : index + 1], scaling.factors[index : index + 1] = fp8.updated_scaling(
            scaling.history[:, index : index + 1],
            recorded[index : index + 1],
            scaling.factors[index : index + 1],
            scaling.kind_of(role),
            settings.margin,
            settings.choice,
        )


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
    if tokens % MULTIPLE:
        raise ValueError(
            f"{tokens} tokens in an FP8 product: must be a multiple of {MULTIPLE}. Fix: pad them with zeros"
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
