"""FP8 to the last bit, against tables of its values and exact arithmetic written out here, and against vLLM's own
code."""

from __future__ import annotations

import math

import numpy as np
import parity
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from live_bytes import LiveBytes

from megarl.ops import fp8
from megarl.ops.fp8 import E4M3, E5M2, ROW_TILE, WEIGHT_TILE

#: (bits of mantissa, bias of the exponent, codes of finite numbers that are not negative): OCP 8-bit floating point
#: 1.0.
FORMATS = {E4M3: (3, 7, 127), E5M2: (2, 15, 124)}
LEAST = float(np.float32(1e-4))


def table(kind: torch.dtype) -> np.ndarray:
    """All finite numbers that are not negative, by their code, in float64."""
    mantissa_bits, bias, codes = FORMATS[kind]
    exponents, mantissas = np.divmod(np.arange(codes), 2**mantissa_bits)
    whole = np.where(exponents == 0, mantissas, mantissas + 2**mantissa_bits)
    return np.ldexp(whole.astype(np.float64), np.maximum(exponents, 1) - bias - mantissa_bits)


def nearest_codes(x: np.ndarray, kind: torch.dtype) -> np.ndarray:
    """Codes of the nearest numbers, ties to the even code, the largest beyond it; 0x7F for NaN."""
    numbers = table(kind)
    middles = (numbers[:-1] + numbers[1:]) / 2
    with np.errstate(invalid="ignore"):
        size = np.abs(x.astype(np.float64))
    found = np.searchsorted(middles, np.where(np.isnan(size), 0, size), side="left")
    tied = (found < len(middles)) & (middles[np.minimum(found, len(middles) - 1)] == size)
    found += tied & (found % 2 == 1)
    return np.where(np.isnan(x), 0x7F, found | np.where(np.signbit(x), 0x80, 0)).astype(np.uint8)


def bits(x: torch.Tensor) -> np.ndarray:
    """What two numbers must share to be one, NaN and the sign of 0 included."""
    return x.contiguous().view({1: torch.uint8, 4: torch.int32}[x.element_size()]).numpy()


def around(numbers: np.ndarray, steps: int) -> np.ndarray:
    """Each fp32 number and as many of those beside it."""
    near = numbers.astype(np.float32).view(np.int32)[:, None] + np.arange(-steps, steps + 1, dtype=np.int32)
    return near.ravel().view(np.float32)


def all_bf16() -> np.ndarray:
    return (np.arange(2**16, dtype=np.uint32) << 16).view(np.float32)


def amaxes() -> np.ndarray:
    """0, infinity, NaN, the least subnormal; every bf16; the surroundings of every 448 x 2**n and of 1e-4; others at
    random."""
    edges = around(np.ldexp(1.75, np.arange(-125, 128)), 130)
    drawn = np.random.default_rng(1).integers(0, 0x7F800000, 20_000, dtype=np.int32).view(np.float32)
    special = np.array([0.0, np.inf, np.nan, 1e-45, 1.2e-38], np.float32)
    found = np.concatenate([special, np.abs(all_bf16()), edges, around(np.array([1e-4]), 3), drawn])
    return found[~(found < 0)]


@pytest.mark.parametrize("kind", [E4M3, E5M2])
def test_cast_rounds_every_number_as_the_table_does(kind):
    numbers = table(kind)
    middles = np.append((numbers[:-1] + numbers[1:]) / 2, 2 * numbers[-1] - numbers[-2])
    x = np.concatenate([all_bf16(), around(numbers[1:], 2), around(middles, 2)])
    x = np.concatenate([x, -x])
    assert np.isnan(x).any() and np.isinf(x).any()
    np.testing.assert_array_equal(bits(fp8.saturating_cast(torch.from_numpy(x), kind)), nearest_codes(x, kind))
    bf16 = torch.from_numpy(all_bf16()).to(torch.bfloat16)
    np.testing.assert_array_equal(bits(fp8.saturating_cast(bf16, kind)), nearest_codes(bf16.float().numpy(), kind))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50), st.sampled_from([E4M3, E5M2]))
def test_cast_of_any_bits(patterns, kind):
    x = np.array(patterns, np.uint32).view(np.float32)
    np.testing.assert_array_equal(bits(fp8.saturating_cast(torch.from_numpy(x), kind)), nearest_codes(x, kind))


def test_the_ends_of_the_formats():
    """By hand, so that the table cannot be wrong with the code."""
    x = torch.tensor([448.0, 1e9, math.inf, 2.0**-9, 2.0**-10, -(2.0**-10) * 1.01, -0.0, -math.nan])
    assert bits(fp8.saturating_cast(x, E4M3)).tolist() == [0x7E, 0x7E, 0x7E, 0x01, 0x00, 0x81, 0x80, 0x7F]
    x = torch.tensor([57344.0, 61440.0, -math.inf, 2.0**-16, 2.0**-17, 2.0**-17 * 1.01, -0.0, math.nan])
    assert bits(fp8.saturating_cast(x, E5M2)).tolist() == [0x7B, 0x7B, 0xFB, 0x01, 0x00, 0x01, 0x80, 0x7F]


def exact_factor(amax: np.ndarray) -> np.ndarray:
    """The largest power of two whose product with amax is at most 448, at most 2**127; 1 of 0, infinity and NaN."""
    usable = (amax > 0) & np.isfinite(amax)
    quotient = 448.0 / np.where(usable, amax, 1.0).astype(np.float64)
    _, exponents = np.frexp(quotient)
    return np.where(usable, np.ldexp(1.0, np.minimum(exponents - 1, 127)), 1.0).astype(np.float32)


def exact_scale(amax: np.ndarray) -> np.ndarray:
    """The smallest power of two whose 448-fold is at least max(amax, 1e-4); infinity and NaN stay."""
    finite = np.isfinite(amax)
    quotient = np.maximum(np.where(finite, amax, 1.0).astype(np.float64), LEAST) / 448.0
    mantissas, exponents = np.frexp(quotient)
    return np.where(finite, np.ldexp(1.0, exponents - (mantissas == 0.5)), amax).astype(np.float32)


def test_power_of_two_formulas_are_exact():
    amax = amaxes()
    factors = fp8.power_of_two_factor(torch.from_numpy(amax))
    np.testing.assert_array_equal(bits(factors), exact_factor(amax).view(np.int32))
    np.testing.assert_array_equal(fp8.power_of_two_scale(torch.from_numpy(amax)).numpy(), exact_scale(amax))
    raised = torch.tensor([0.0, 1e-30, 2.0, math.nan])
    assert fp8.power_of_two_factor(raised, least_amax=1.0).tolist() == [256.0, 256.0, 128.0, 1.0]


def test_both_formulas_agree_from_1e_4_up_and_not_below():
    amax = torch.from_numpy(amaxes())
    theirs, ours = 1.0 / fp8.power_of_two_factor(amax), fp8.power_of_two_scale(amax)
    agree = (amax >= LEAST) & amax.isfinite()
    assert agree.sum() > 40_000
    np.testing.assert_array_equal(bits(theirs[agree]), bits(ours[agree]))
    # 448 x 2**-22 is the first below 1e-4's own power.
    small = (amax < 448 * 2.0**-23) & (amax > 0)
    assert small.sum() > 10_000 and (theirs[small] < ours[small]).all()


def test_where_vllms_logarithm_is_off_only_just_above_a_power():
    """2 ** ceil(log2(q)) in fp32 halves the scale in the first few fp32 numbers above 448 x 2**n; never for bf16."""

    def literal(amax: np.ndarray) -> np.ndarray:
        quotient = torch.from_numpy(amax).clamp(min=1e-4) / 448
        return torch.pow(2.0, torch.ceil(torch.log2(quotient.abs()))).numpy()

    bf16 = np.abs(all_bf16())
    bf16 = bf16[np.isfinite(bf16)]
    np.testing.assert_array_equal(literal(bf16), exact_scale(bf16))
    for exponents, most in [(np.arange(-15, 1), 7), (np.arange(-22, 120), 100)]:
        edge = np.ldexp(448.0, exponents).astype(np.float32)
        for step in range(-130, 131):
            amax = around(edge, 130).reshape(len(edge), -1)[:, step + 130].copy()
            off = literal(amax) != exact_scale(amax)
            assert not off.any() or 0 < step <= most
            assert (literal(amax)[off] * 2 == exact_scale(amax)[off]).all()


def quantised_by_hand(x: np.ndarray, tile: tuple[int, int], formula: str) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales, tile after tile. TE passes over NaN in amax, vLLM does not."""
    rows, columns = tile
    codes = np.zeros(x.shape, np.uint8)
    scales = np.zeros((math.ceil(x.shape[0] / rows), math.ceil(x.shape[1] / columns)), np.float32)
    for i, j in np.ndindex(scales.shape):
        at = np.s_[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
        largest = np.abs(x[at]).max() if formula == "vllm" else np.fmax.reduce(np.abs(x[at]), axis=None)
        amax = np.array([0.0 if formula == "te" and np.isnan(largest) else largest], np.float32)
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            scales[i, j] = exact_scale(amax)[0] if formula == "vllm" else np.float32(1) / exact_factor(amax)[0]
            scaled = x[at] * (np.float32(1) / scales[i, j])
        codes[at] = nearest_codes(scaled, E4M3)
    return codes, scales


def awkward(seed: int, shape: tuple[int, int]) -> np.ndarray:
    """Normal numbers whose tiles differ in size from 1e-44 to 1e36, with tiles of 0, infinity, NaN and subnormals."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape).astype(np.float32)
    for i, j in np.ndindex(math.ceil(shape[0] / 128), math.ceil(shape[1] / 128)):
        x[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128] *= np.float32(10.0 ** rng.uniform(-38, 36))
    x[:128, :128] = 0.0
    x[3, 130], x[140, 5], x[141, 140], x[142, 141] = np.inf, np.nan, np.nan, -np.inf
    x[256:300, :100] = np.float32(1e-42) * rng.integers(-3, 4, (44, 100))
    return x


@pytest.mark.parametrize("tile", [WEIGHT_TILE, ROW_TILE])
def test_tiles_are_quantised_as_written_out(tile):
    x = awkward(2, (301, 277))
    codes, scales = quantised_by_hand(x, tile, "te")
    found = fp8.quantise_tiles(torch.from_numpy(x), tile)
    np.testing.assert_array_equal(bits(found.values), codes)
    np.testing.assert_array_equal(bits(found.scales), scales.view(np.int32))
    numbers = np.where(codes & 0x7F == 0x7F, np.nan, table(E4M3)[np.minimum(codes & 0x7F, 126)])
    numbers = (np.where(codes & 0x80, -numbers, numbers)).astype(np.float32)
    at_each = scales.repeat(tile[0], 0)[: len(x)].repeat(tile[1], 1)[:, : x.shape[1]]
    np.testing.assert_array_equal(found.dequantised().numpy(), numbers * at_each)
    back = found.transposed()
    np.testing.assert_array_equal(back.dequantised().numpy(), found.dequantised().numpy().T)


@pytest.mark.parametrize("at_once", [fp8.SLAB_ELEMENTS, 1])
def test_weights_are_quantised_as_written_out(at_once: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fp8, "SLAB_ELEMENTS", at_once)
    x = awkward(3, (301, 277))
    codes, scales = quantised_by_hand(x, WEIGHT_TILE, "vllm")
    found = fp8.quantise_weight(torch.from_numpy(x))
    np.testing.assert_array_equal(bits(found.values), codes)
    np.testing.assert_array_equal(found.scales.numpy(), scales)
    assert np.isnan(scales[1, 0]) and np.isinf(scales[0, 1]) and (found.values.float()[:128, :128] == 0).all()


def test_a_weight_takes_little_memory_while_it_is_quantised(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fp8, "SLAB_ELEMENTS", 2**16)
    weight = torch.randn(2**11, 2**9, generator=torch.Generator().manual_seed(6)).bfloat16()
    with LiveBytes(weight) as live:
        made = fp8.quantise_weight(weight)
    assert live.peak < made.values.nbytes + 2 * made.scales.nbytes + fp8.SLAB_BYTES // fp8.SLAB_ELEMENTS * 2**16 + 2**16


def test_both_quantise_alike_where_every_amax_is_1e_4_or_more():
    x = torch.randn(300, 520, generator=torch.Generator().manual_seed(4))
    x[0:128, 0:128] *= 1e-4
    for weight in (x, x.bfloat16()):
        theirs, ours = fp8.quantise_tiles(weight, WEIGHT_TILE), fp8.quantise_weight(weight)
        np.testing.assert_array_equal(bits(theirs.values), bits(ours.values))
        np.testing.assert_array_equal(bits(theirs.scales), bits(ours.scales))


def test_parts_equal_the_whole_where_cuts_lie_on_multiples_of_128():
    weight = torch.randn(384, 640, generator=torch.Generator().manual_seed(5))
    weight *= torch.logspace(-2, 2, 384)[:, None] * torch.logspace(-1, 1, 640)
    whole = fp8.quantise_weight(weight)

    def differs(rows: int, columns: int) -> bool:
        part = fp8.quantise_weight(weight[rows:, columns:])
        values = whole.values[rows:, columns:]
        scales = whole.scales[-len(part.scales) :, -part.scales.shape[1] :]
        return bool((bits(part.values) != bits(values)).any() or (part.scales != scales).any())

    assert not any(differs(rows, columns) for rows in (0, 128, 256) for columns in (0, 128, 384))
    assert all(differs(rows, columns) for rows, columns in [(64, 0), (0, 64), (192, 128), (128, 500)])


def test_one_factor_for_the_whole_matrix():
    amax = np.array([0.0, np.inf, np.nan, 1e-45, 1e-38, 3.0, 448.0, 3e38], np.float32)
    for kind, largest in [(E4M3, 448.0), (E5M2, 57344.0)]:
        for margin in (0, 2):
            expected = [1.0, 1.0, 1.0]
            for one in amax[3:]:
                quotient = largest * 2.0**-margin / float(one)
                expected.append(min(quotient, float(np.finfo(np.float32).max)))
            found = fp8.amax_factor(torch.from_numpy(amax), kind, margin).numpy()
            np.testing.assert_array_equal(found, np.array(expected, np.float32))
    assert fp8.whole_amax(torch.tensor([[1.0, -3.0], [math.nan, 2.0]])) == 3.0
    assert fp8.whole_amax(torch.tensor([1.0, -math.inf])) == math.inf
    assert fp8.whole_amax(torch.zeros(0, 4)) == 0.0
    assert fp8.whole_amax(torch.tensor([math.nan])) == 0.0


def test_parts_of_a_matrix_with_the_amax_of_all_are_parts_of_the_whole():
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(6))
    x[40, 80] = 7.0
    whole = fp8.quantise_whole(x, fp8.amax_factor(fp8.whole_amax(x), E4M3), E4M3)
    scaled = x.numpy() * (np.float32(448) / np.float32(7))
    np.testing.assert_array_equal(bits(whole.values), nearest_codes(scaled, E4M3))
    assert whole.scales == np.float32(1) / (np.float32(448) / np.float32(7))
    parts = [x[:, :50], x[:, 50:]]
    together = torch.stack([fp8.whole_amax(part) for part in parts]).amax()
    cut = [fp8.quantise_whole(part, fp8.amax_factor(together, E4M3), E4M3).values for part in parts]
    np.testing.assert_array_equal(np.concatenate([bits(one) for one in cut], 1), bits(whole.values))
    alone = fp8.quantise_whole(parts[0], fp8.amax_factor(fp8.whole_amax(parts[0]), E4M3), E4M3)
    assert (bits(alone.values) != bits(whole.values)[:, :50]).any()


def updated_by_hand(history, recorded, factor, largest, margin, choice):
    """kernel_bulk of Transformer Engine's delayed_scaling.cu for one tensor, as a loop over the history's rows."""
    new, amax, length = list(history), 0.0, len(history)
    if recorded != 0:
        for i in range(length):
            a = history[i + 1] if i < length - 1 else recorded
            amax = a if math.isnan(amax) or a > amax else amax
            new[i] = a if i > 0 else 0.0
    if choice == "most_recent":
        amax = recorded
    if math.isfinite(amax) and amax > 0:
        scaled_max = np.float32(largest) * np.float32(2.0**-margin)
        with np.errstate(over="ignore"):
            factor = min(scaled_max / np.float32(amax), np.finfo(np.float32).max)
    return new, factor


@pytest.mark.parametrize("choice", ["max", "most_recent"])
@pytest.mark.parametrize("length", [1, 2, 4])
@pytest.mark.parametrize(("kind", "largest", "margin"), [(E4M3, 448.0, 0), (E5M2, 57344.0, 1)])
def test_delayed_scaling_follows_the_kernel(choice, length, kind, largest, margin):
    """Two tensors side by side; the second records everything that is no number, and nothing."""
    second = [2.0, 0.0, math.inf, 1e-45, math.nan, 3.0, 4.0, 1.0]
    history, factors = torch.zeros(length, 2), torch.ones(2)
    by_hand = [([0.0] * length, np.float32(1.0)) for _ in range(2)]
    for step in zip([3.0, 1.0, 5.0, 0.5, 0.25, 2.0, 0.0, 1.0], second, strict=True):
        history, factors = fp8.updated_scaling(history, torch.tensor(step), factors, kind, margin, choice)
        by_hand = [
            updated_by_hand(*one, largest, margin, choice)
            for one in [(known[0], np.float32(amax), known[1]) for known, amax in zip(by_hand, step, strict=True)]
        ]
        np.testing.assert_array_equal(history.numpy(), np.array([one[0] for one in by_hand], np.float32).T)
        np.testing.assert_array_equal(factors.numpy(), np.array([one[1] for one in by_hand], np.float32))
        assert (history[0] == 0).all()


def test_delayed_scaling_in_numbers():
    """History of 3: an amax counts for three steps in all, and for the factor of the one in which it falls out."""
    history, factors, seen = torch.zeros(3, 1), torch.ones(1), []
    for amax in (7.0, 3.5, 1.75, 1.75, 1.75):
        history, factors = fp8.updated_scaling(history, torch.tensor([amax]), factors, E4M3, 0, "max")
        seen.append((factors.item(), history[:, 0].tolist()))
    assert seen == [
        (64.0, [0.0, 0.0, 7.0]),
        (64.0, [0.0, 7.0, 3.5]),
        (64.0, [0.0, 3.5, 1.75]),
        (128.0, [0.0, 1.75, 1.75]),
        (256.0, [0.0, 1.75, 1.75]),
    ]


def operands(m: int, n: int, k: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    return torch.randn(m, k, generator=drawn), torch.randn(n, k, generator=drawn)


def quantise(x: torch.Tensor, tile: tuple[int, int] | None, kind: torch.dtype) -> fp8.Quantised:
    if tile is None:
        return fp8.quantise_whole(x, fp8.amax_factor(fp8.whole_amax(x), kind), kind)
    return fp8.quantise_tiles(x, tile, kind=kind)


@pytest.mark.parametrize("tiles", [(None, None), (ROW_TILE, WEIGHT_TILE), (ROW_TILE, ROW_TILE)])
def test_product_is_that_of_the_dequantised_matrices(tiles):
    a, b = operands(33, 150, 300, 7)
    a *= torch.logspace(-3, 3, 300)
    quantised = [quantise(one, tile, E4M3) for one, tile in zip((a, b), tiles, strict=True)]
    numbers = [one.dequantised().double() for one in quantised]
    found = fp8.product(*quantised).double()
    # fp32 sums of 300 terms: each of at most 300 roundings of 2**-24 of the terms' magnitudes.
    assert ((found - numbers[0] @ numbers[1].T).abs() <= 300 * 2.0**-24 * (numbers[0].abs() @ numbers[1].abs().T)).all()


def test_product_of_numbers_that_fp8_has_is_exact():
    drawn = torch.Generator().manual_seed(8)
    a, b = torch.randint(-8, 9, (16, 256), generator=drawn), torch.randint(-8, 9, (130, 256), generator=drawn)
    a[:, 0] = b[:, 0] = a[:, 128] = b[:, 128] = 7
    for tiles in [(None, None), (ROW_TILE, WEIGHT_TILE)]:
        pair = [quantise(one.float(), tile, E4M3) for one, tile in zip((a, b), tiles, strict=True)]
        if tiles[0]:
            assert fp8.product(*pair).equal((a @ b.T).float())
    pair = [fp8.quantise_whole(one.float(), torch.tensor(32.0), E4M3) for one in (a, b)]
    assert fp8.product(*pair).equal((a @ b.T).float())


def test_product_refuses_what_shares_no_scale_along_the_sum():
    a, b = operands(16, 128, 128, 9)
    rows, whole = quantise(a, ROW_TILE, E4M3), quantise(b, None, E4M3)
    with pytest.raises(ValueError, match="quantise both by one recipe"):
        fp8.product(rows, whole)
    with pytest.raises(ValueError, match="quantise the transposed matrix"):
        fp8.product(rows.transposed(), quantise(b, WEIGHT_TILE, E4M3))


@pytest.mark.parametrize(("kinds", "expected"), [((E4M3, E4M3), 0.034), ((E5M2, E4M3), 0.053)])
@pytest.mark.parametrize("tiles", [(None, None), (ROW_TILE, ROW_TILE)])
def test_relative_error_of_a_product_of_normal_numbers(kinds, expected, tiles):
    """Rounding changes a normal number by at most u = 2**-4 of it (e4m3: 3 bits of mantissa) or 2**-3 (e5m2). Within a
    binade the error is spread evenly, so its mean square is at most u**2 / 3, relative to the number, and u**2 / 7
    where mantissas are spread evenly too (the mean square of 1 to 2 is 7/3). The errors of K terms are independent and
    so grow as their sum does, with the square root of K: the product's relative error is the root of both operands'
    sum.
    """
    k = 2048
    a, b = operands(64, 96, k, 10)
    pair = [quantise(one, tile, kind) for one, tile, kind in zip((a, b), tiles, kinds, strict=True)]
    exact = a.double() @ b.double().T
    error = float((fp8.product(*pair).double() - exact).norm() / exact.norm())
    bound = math.sqrt(sum(fp8.ROUNDING[kind] ** 2 / 3 for kind in kinds))
    even = math.sqrt(sum(fp8.ROUNDING[kind] ** 2 / 7 for kind in kinds))
    assert even == pytest.approx(expected, abs=0.001)
    assert error < bound
    assert error == pytest.approx(even, rel=0.2)


def of_vllm(_world, weight: torch.Tensor) -> list[torch.Tensor]:
    """vLLM's own block quantisation of a weight, and what its loading makes of it where DeepGEMM takes powers of
    two."""
    from vllm.model_executor.layers.quantization.utils.fp8_utils import requant_weight_ue8m0_inplace
    from vllm.utils import deep_gemm

    # Not compiled: what it does, without a compiler.
    deep_gemm.per_block_cast_to_fp8 = deep_gemm.per_block_cast_to_fp8.__wrapped__
    values, scales = deep_gemm.per_block_cast_to_fp8(weight, use_ue8m0=True)
    loaded = values.clone(), scales.clone()
    requant_weight_ue8m0_inplace(*loaded)
    # As bytes: pickling knows no FP8.
    return [values.view(torch.uint8), scales, loaded[0].view(torch.uint8), loaded[1]]


@pytest.mark.processes
def test_vllm_quantises_the_same_and_loading_may_halve_a_scale():
    weight = torch.randn(300, 400, generator=torch.Generator().manual_seed(11)).bfloat16()
    weight[:128, :128] *= 1e-6
    # Just above 224 x 2**-6: rounded to 224, from which vLLM's loading takes half the scale, and twice the values.
    weight[128:256, :128] *= 3.5 / weight[128:256, :128].abs().max()
    weight[130, 7] = 3.53
    values, scales, loaded_values, loaded_scales = parity.run_world("test_ops_fp8", "of_vllm", 1, weight)[0]
    ours = fp8.quantise_weight(weight)
    np.testing.assert_array_equal(bits(ours.values), values.numpy())
    np.testing.assert_array_equal(bits(ours.scales), bits(scales))
    loaded = fp8.Quantised(loaded_values.view(E4M3), loaded_scales, WEIGHT_TILE)
    assert loaded.dequantised().equal(ours.dequantised())
    halved = loaded_scales != scales
    assert halved[1, 0] and (loaded_scales[halved] * 2 == scales[halved]).all()
