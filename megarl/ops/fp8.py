"""FP8: casts, scales, quantised matrices and their products, as Transformer Engine and vLLM define them.

Two formats: e4m3 (4 bits of exponent, 3 of mantissa, largest 448) and e5m2 (5 and 2, largest 57,344). A quantised
matrix has FP8 values and fp32 scales: one of the whole matrix, or one of each tile. Here `scales` are always what
values are multiplied by to get numbers back (`scale_inv` in Transformer Engine, `weight_scale_inv` in vLLM's
checkpoints), `factor` is what numbers are multiplied by before the cast (`scale` in Transformer Engine).

Sources, where a docstring names them: TE is Transformer Engine 2.11's Python and the CUDA files of its repository
(common/recipe/recipe_common.cuh, current_scaling.cu, delayed_scaling.cu,
common/transpose/quantize_transpose_square_blockwise.cu); vLLM is 0.32 (vllm/utils/deep_gemm.py: per_block_cast_to_fp8);
CUDA is cuda_fp8.hpp.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from megarl.config.quantisation import BLOCK

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {E4M3: 448.0, E5M2: 57344.0}
#: Half a unit in the last place of 1.0: the most that rounding changes a normal number by, relative to it.
ROUNDING = {E4M3: 2.0**-4, E5M2: 2.0**-3}

#: Rows and columns that share a scale.
Tile = tuple[int, int]
WEIGHT_TILE: Tile = (BLOCK, BLOCK)
#: Of activations and gradients, along what a product sums over.
ROW_TILE: Tile = (1, BLOCK)
#: The same of what is transposed before a product.
COLUMN_TILE: Tile = (BLOCK, 1)

#: Below which vLLM takes a tile's amax for this.
VLLM_LEAST_AMAX = 1e-4

#: Of a weight at a time, and what that many take while they are quantised: few enough to be nothing beside a model's
#: weights, enough for a GPU to be busy (our choice).
SLAB_ELEMENTS = 1 << 22
SLAB_BYTES = 16 * SLAB_ELEMENTS

AmaxChoice = Literal["max", "most_recent"]

_LARGEST_FLOAT = torch.finfo(torch.float32).max
_EXPONENT_BITS, _MANTISSA_BITS = 0x7F800000, 0x007FFFFF


@dataclass(frozen=True)
class Recipe:
    """What FP8 is made of in a linear layer. Inputs and weights are e4m3, in the forward pass and in the backward
    pass."""

    gradients: torch.dtype
    """Of outputs' gradients: e5m2 is TE's HYBRID format, TE's default but for blocks."""
    tiles: bool
    """A power-of-two scale per tile, or one fp32 scale per matrix."""
    delayed: bool = False
    """Scales of earlier steps' amax, not of the matrix's own."""


#: TE's Float8CurrentScaling, DelayedScaling, Float8BlockScaling.
RECIPES = {
    "fp8-tensorwise": Recipe(gradients=E5M2, tiles=False),
    "fp8-delayed": Recipe(gradients=E5M2, tiles=False, delayed=True),
    "fp8-blockwise": Recipe(gradients=E4M3, tiles=True),
}


@dataclass(frozen=True)
class Quantised:
    """A matrix (M, K) in FP8."""

    values: Tensor
    """(M, K) e4m3 or e5m2."""
    scales: Tensor
    """() fp32; with tiles (ceil(M / rows), ceil(K / columns)) fp32, counted from the matrix's origin."""
    tile: Tile | None = None

    def transposed(self) -> Quantised:
        """(K, M): the same numbers. A row of `ROW_TILE`s becomes a column, which `product` does not sum over."""
        if self.tile is None:
            return Quantised(self.values.T, self.scales)
        return Quantised(self.values.T, self.scales.T, (self.tile[1], self.tile[0]))

    def dequantised(self) -> Tensor:
        """(M, K) fp32, value x scale: exact with power-of-two scales, down to fp32's least normal number."""
        if self.tile is None:
            return numbers(self.values) * self.scales
        return times_tiles(numbers(self.values), self.scales, self.tile)


def saturating_cast(x: Tensor, kind: torch.dtype) -> Tensor:
    """`x` (fp32, bf16) in FP8: the nearest number, ties to even, subnormals kept, and the largest for all beyond it.

    Infinity becomes the largest too; NaN stays NaN, as 0x7F without a sign. This is CUDA's conversion with
    __NV_SATFINITE (__nv_cvt_double_to_fp8; PTX cvt.rn.satfinite), to which TE's and vLLM's kernels cast. PyTorch's own
    cast to e5m2 makes 61,440 and more infinite on the CPU, and its cast to e4m3 did not saturate in every version: so
    it is bounded first, which changes no rounding.
    """
    return x.float().nan_to_num(torch.nan, LARGEST[kind], -LARGEST[kind]).clamp(-LARGEST[kind], LARGEST[kind]).to(kind)


def numbers(values: Tensor) -> Tensor:
    """FP8 values as fp32, any shape; NaN of either sign is NaN.

    On the CPU by a table of the 256 numbers, which takes a fifth of the time of PyTorch's cast.
    """
    if values.is_cuda or values.is_meta:
        return values.float()
    if values.dim() == 2 and not values.is_contiguous() and values.T.is_contiguous():
        return numbers(values.T).T
    table = torch.arange(256, dtype=torch.uint8).view(values.dtype).float()
    return table.index_select(0, values.reshape(-1).view(torch.uint8).int()).view(values.shape)


def whole_amax(x: Tensor) -> Tensor:
    """() fp32: the largest magnitude, NaN passed over, 0 of no elements. TE: amax_kernel, whose fmaxf passes over NaN.

    Of a matrix that ranks hold parts of, the largest of theirs is the whole's: reduce it (MAX) before `amax_factor`.
    """
    if x.numel() == 0:
        return torch.zeros((), device=x.device)
    return _without_nan(x).amax().float()


def tile_amax(magnitudes_MK: Tensor, tile: Tile) -> Tensor:
    """(ceil(M / rows), ceil(K / columns)) fp32: the largest of each tile; NaN where a tile has one.

    Args:
        magnitudes_MK: (M, K), nothing negative; what is missing of tiles at the far edges counts as 0 (TE and vLLM).
        tile: (rows, columns).
    """
    return _by_tile(magnitudes_MK, tile).amax((1, 3)).float()


def times_tiles(x_MK: Tensor, scales: Tensor, tile: Tile) -> Tensor:
    """(M, K): each element times its tile's scale; `scales` as in `Quantised`."""
    m, k = x_MK.shape
    return (_by_tile(x_MK, tile) * scales[:, None, :, None]).flatten(2).flatten(0, 1)[:m, :k]


def _by_tile(x_MK: Tensor, tile: Tile) -> Tensor:
    """(ceil(M / rows), rows, ceil(K / columns), columns), with zeros at the far edges."""
    (rows, columns), (m, k) = tile, x_MK.shape
    if m % rows or k % columns:
        x_MK = F.pad(x_MK, (0, -k % columns, 0, -m % rows))
    return x_MK.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))


def power_of_two_factor(amax: Tensor, least_amax: float = 0.0, kind: torch.dtype = E4M3) -> Tensor:
    """TE's factor of a tile: the largest power of two that keeps `amax` within the format. fp32, the shape of `amax`.

    TE, compute_scale_from_amax with force_pow_2_scales: 1 where amax is 0, infinite or NaN; else largest / amax, an
    infinite quotient taken as fp32's largest number (of bf16 tensors bf16's: the same power), and the mantissa cleared.

    Args:
        amax: fp32, a tile's largest magnitude.
        least_amax: amax_epsilon, 0 in TE's recipe.
    """
    amax = amax.clamp(min=least_amax)
    factor = _quotient(LARGEST[kind], amax).clamp(max=_LARGEST_FLOAT)
    factor = (factor.view(torch.int32) & _EXPONENT_BITS).view(torch.float32)
    return torch.where((amax > 0) & amax.isfinite(), factor, 1.0)


def power_of_two_scale(amax: Tensor) -> Tensor:
    """vLLM's scale of a tile: max(amax, 1e-4) / 448, rounded up to a power of two. fp32, the shape of `amax`.

    For 1e-4 <= amax < infinity this is 1 / `power_of_two_factor(amax)` to the bit. An infinite amax gives an infinite
    scale, NaN gives NaN, where TE has 1: weights that are broken stay so.

    vLLM (_ceil_to_ue8m0) writes 2 ** ceil(log2(quotient)) in fp32. There the logarithm of a quotient just above a power
    of two rounds down to a whole number, so that the scale is half of what holds amax, which then saturates: in the
    first few fp32 numbers above 448 x 2**n (some 4 for amax near 0.1, at most 100), never for a bf16 amax. Here the
    bits are rounded.
    """
    quotient = amax.clamp(min=VLLM_LEAST_AMAX) / LARGEST[E4M3]
    rounded = ((quotient.view(torch.int32) + _MANTISSA_BITS) & _EXPONENT_BITS).view(torch.float32)
    return torch.where(quotient.isnan(), quotient, rounded)


def amax_factor(amax: Tensor, kind: torch.dtype, margin: float = 0.0) -> Tensor:
    """The fp32 factor of a whole matrix: largest x 2**-margin / amax. The shape of `amax`.

    TE, current_scaling.cu (compute_scale_from_amax without powers of two): 1 where amax is 0, infinite or NaN, and
    fp32's largest number where the quotient is infinite. TE has a margin under delayed scaling alone: 0 here.

    Args:
        amax: fp32, of the whole matrix, however many ranks hold it.
        margin: powers of two that stay free.
    """
    factor = _quotient(LARGEST[kind] * 2.0**-margin, amax).clamp(max=_LARGEST_FLOAT)
    return torch.where((amax > 0) & amax.isfinite(), factor, 1.0)


def updated_scaling(
    history_HT: Tensor, recorded_T: Tensor, factors_T: Tensor, kind: torch.dtype, margin: float, choice: AmaxChoice
) -> tuple[Tensor, Tensor]:
    """What delayed scaling knows after a step: (history_HT, factors_T), both new.

    TE, kernel_bulk of delayed_scaling.cu. Row 0 of a history is where the current step's amax is recorded, the newest
    finished step is the last row, the oldest is row 1. The recorded amax goes in as the last row, the oldest falls out,
    row 0 becomes 0; the factor is of the largest of all these, the oldest included, or of the recorded one. Where
    nothing was recorded (0) history and factor stay as they are: TE's kernel has that, its Python fallback rolls. An
    amax that is infinite, or NaN as the most recent, leaves the factor as it is; the largest passes over NaN (fmaxf).

    Args:
        history_HT: (length, tensors) fp32, length at least 1; zeros at the start.
        recorded_T: (tensors,) fp32, row 0 of the history, or the largest of all ranks' (TE: reduced before).
        factors_T: (tensors,) fp32; ones at the start.
        kind: the format of these tensors.
        margin: powers of two that stay free.
        choice: amax_compute_algo.
    """
    rolled_HT = torch.cat([history_HT[1:], recorded_T[None]])
    amax_T = rolled_HT.nan_to_num(0.0, torch.inf).amax(0) if choice == "max" else recorded_T
    usable_T = (amax_T > 0) & amax_T.isfinite() & (recorded_T != 0)
    factors_T = torch.where(usable_T, amax_factor(amax_T, kind, margin), factors_T)
    rolled_HT[0] = 0.0
    return torch.where(recorded_T != 0, rolled_HT, history_HT), factors_T


def quantise_whole(x: Tensor, factor: Tensor, kind: torch.dtype) -> Quantised:
    """The matrix `x` with one factor, () fp32: cast(x x factor), scale 1 / factor. TE: cast kernels,
    Float8Quantizer."""
    return Quantised(saturating_cast(x.float() * factor, kind), 1.0 / factor)


def quantise_tiles(x_MK: Tensor, tile: Tile, least_amax: float = 0.0, kind: torch.dtype = E4M3) -> Quantised:
    """The matrix with a power-of-two scale per tile, by TE's formula (Float8BlockQuantizer).

    NaN is passed over in a tile's amax and stays in its place; a tile with an infinite number has scale 1.
    """
    factors = power_of_two_factor(tile_amax(_without_nan(x_MK), tile), least_amax, kind)
    return Quantised(saturating_cast(times_tiles(x_MK.float(), factors, tile), kind), 1.0 / factors, tile)


def times_blocks(x_NK: Tensor, scales: Tensor) -> Tensor:
    """(N, K), or a stack (E, N, K): each element times its block's scale; `scales` as in `quantise_weight`."""
    if x_NK.dim() == 2:
        return times_tiles(x_NK, scales, WEIGHT_TILE)
    return torch.stack([times_tiles(*pair, WEIGHT_TILE) for pair in zip(x_NK, scales, strict=True)])


def quantise_weight(weight_NK: Tensor) -> Quantised:
    """A weight as vLLM's block checkpoints have it: `values` are `weight`, `scales` are `weight_scale_inv`.

    vLLM's formula with tiles of 128 x 128. Equal to TE's where every tile's amax is finite and at least 1e-4; below
    that the scale is 2**-22, so that the values shrink instead. Of a part that is cut at multiples of 128 in both
    dimensions it gives the whole's part, to the bit. Where a tile has NaN its scale is NaN; where it has infinity,
    infinite.

    Rows of blocks are quantised by themselves, `SLAB_ELEMENTS` at a time: beside the result it takes `SLAB_BYTES`.
    """
    values, scales = torch.empty_like(weight_NK, dtype=E4M3, memory_format=torch.contiguous_format), list[Tensor]()
    rows = max(1, SLAB_ELEMENTS // (BLOCK * max(1, weight_NK.shape[1]))) * BLOCK
    for slab, place in zip(weight_NK.split(rows), values.split(rows), strict=True):
        scales.append(power_of_two_scale(tile_amax(slab.abs(), WEIGHT_TILE)))
        place.copy_(saturating_cast(times_tiles(slab.float(), 1.0 / scales[-1], WEIGHT_TILE), E4M3))
    return Quantised(values, torch.cat(scales), WEIGHT_TILE)


def product(a_MK: Quantised, b_NK: Quantised) -> Tensor:
    """(M, N) fp32: a times b transposed, both with what is summed over as their columns, as Hopper's tensor cores want
    them.

    Exact: each product of two FP8 values (8 bits of mantissa at most). Approximate: the order of the fp32 sum, which
    differs from kernel to kernel, and its precision: Hopper's tensor cores keep about 14 bits within an instruction. TE
    promotes to fp32 at intervals (use_split_accumulator) except in the forward product under current scaling, and there
    the hardware loses more than is lost here. With tiles cuBLAS and DeepGEMM sum over 128 columns, multiply by both
    scales, and add; here numbers are multiplied first, which is exact with power-of-two scales, so that only order and
    precision differ.
    """
    if a_MK.tile is None or b_NK.tile is None:
        if a_MK.tile is not None or b_NK.tile is not None:
            raise ValueError("a product of a matrix with tiles and one without. Fix: quantise both by one recipe")
        return (numbers(a_MK.values) @ numbers(b_NK.values).T) * (a_MK.scales * b_NK.scales)
    if a_MK.tile[1] != BLOCK or b_NK.tile[1] != BLOCK:
        raise ValueError(
            f"tiles of {a_MK.tile} and {b_NK.tile}: a product sums over {BLOCK} columns of one scale. "
            "Fix: quantise the transposed matrix, not transpose the quantised one"
        )
    return a_MK.dequantised() @ b_NK.dequantised().T


def _quotient(number: float, x: Tensor) -> Tensor:
    """number / x, rounded once. PyTorch's `number / x` is number x (1 / x), which rounds twice."""
    return torch.full_like(x, number) / x


def _without_nan(x: Tensor) -> Tensor:
    """Magnitudes, 0 in place of NaN."""
    return x.abs().nan_to_num(0.0, torch.inf)
