"""Masks, segment sums, ratios, clip and aggregation: values and gradients in float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megarl.ops.aggregate import token_weights
from megarl.ops.clip import clipped_objective
from megarl.ops.masking import sum_counted, zero_masked
from megarl.ops.ratios import sequence_ratio, token_ratio
from megarl.ops.segments import sum_by_sequence

NAN = float("nan")


def double(*values, grad=False):
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


def gradient(outputs, leaf):
    """d (sum of outputs) / d leaf as a list."""
    return torch.autograd.grad(outputs.sum(), leaf)[0].tolist()


def test_masked_nan_reaches_neither_value_nor_gradient():
    values = double(1.0, NAN, 3.0, math.inf, grad=True)
    counted = torch.tensor([True, False, True, False])
    kept = zero_masked(counted, values)
    assert kept.tolist() == [1.0, 0.0, 3.0, 0.0]
    assert gradient(kept.square(), values) == [2.0, 0.0, 6.0, 0.0]


def test_metric_sums_are_float64_without_gradient_whatever_goes_in():
    counted = torch.tensor([True, True, False])
    of_floats = sum_counted(counted, torch.tensor([0.5, 2.0, NAN], requires_grad=True))
    of_flags = sum_counted(counted, torch.tensor([True, False, True]))
    assert (of_floats.item(), of_flags.item()) == (2.5, 1.0)
    assert of_floats.dtype == of_flags.dtype == torch.float64
    assert not of_floats.requires_grad


@given(st.lists(st.tuples(st.floats(-5, 5), st.integers(0, 3)), max_size=12))
def test_sums_by_sequence(pairs):
    values = double(*(value for value, _ in pairs), grad=True)
    sequence = torch.tensor([index for _, index in pairs], dtype=torch.int64)
    sums = sum_by_sequence(values, sequence, 4)
    assert sums.tolist() == pytest.approx([math.fsum(v for v, s in pairs if s == i) for i in range(4)], abs=1e-12)
    assert gradient(sums * double(1.0, 10.0, 100.0, 1000.0), values) == [10.0**index for _, index in pairs]


def test_token_ratio_and_its_clamp():
    log_ratio = double(0.5, -3.0, 2.0, 7.0, -90.0, grad=True)
    ratio = token_ratio(log_ratio, clamp=2.5)
    assert ratio.tolist() == pytest.approx([math.exp(x) for x in (0.5, -2.5, 2.0, 2.5, -2.5)])
    assert gradient(ratio, log_ratio) == pytest.approx([math.exp(0.5), 0.0, math.exp(2.0), 0.0, 0.0])


def test_sequence_ratio_is_exp_of_the_mean_and_carries_gradient():
    log_ratio = double(0.3, -0.1, 0.4, 2.0, -0.6, grad=True)
    sequence = torch.tensor([0, 0, 0, 2, 2])
    lengths = double(3.0, 0.0, 2.0)
    ratio = sequence_ratio(log_ratio, sequence, lengths, clamp=20.0)
    first, last = math.exp(0.2), math.exp(0.7)
    assert ratio.tolist() == pytest.approx([first, first, first, last, last])
    upstream = (1.0, 2.0, 4.0, 8.0, 16.0)
    # d s_u / d x_t = s / length for every u, t of one sequence
    assert gradient(ratio * double(*upstream), log_ratio) == pytest.approx([7 * first / 3] * 3 + [24 * last / 2] * 2)
    assert torch.autograd.gradcheck(lambda x: sequence_ratio(x, sequence, lengths, 20.0), (log_ratio,))


def test_sequence_ratio_clamps_the_mean_not_the_tokens():
    log_ratio = double(9.0, -9.0, 3.0, 3.0, grad=True)
    sequence = torch.tensor([0, 0, 1, 1])
    ratio = sequence_ratio(log_ratio, sequence, double(2.0, 2.0), clamp=1.0)
    assert ratio.tolist() == pytest.approx([1.0, 1.0, math.e, math.e])
    assert gradient(ratio, log_ratio) == pytest.approx([1.0, 1.0, 0.0, 0.0])


# ratio, advantage -> objective, its slope in the ratio, clipped, dual-clipped; low 0.2, high 0.28, dual 3
REGIONS = [
    (1.0, 2.0, 2.0, 2.0, False, False),
    (0.1, 2.0, 0.2, 2.0, False, False),  # a positive advantage has no lower bound
    (1.27, 2.0, 2.54, 2.0, False, False),
    (1.29, 2.0, 2.56, 0.0, True, False),
    (50.0, 2.0, 2.56, 0.0, True, False),
    (1.0, -2.0, -2.0, -2.0, False, False),
    (0.81, -2.0, -1.62, -2.0, False, False),
    (0.79, -2.0, -1.6, 0.0, True, False),
    (2.9, -2.0, -5.8, -2.0, False, False),  # beyond 1 + high, but a negative advantage is not clipped there
    (3.1, -2.0, -6.0, 0.0, False, True),
    (5.0, 0.0, 0.0, 0.0, False, False),
    (0.0, 0.0, 0.0, 0.0, False, False),
]


@pytest.mark.parametrize(("ratio", "advantage", "value", "slope", "clipped", "dual_clipped"), REGIONS)
def test_clip_regions(ratio, advantage, value, slope, clipped, dual_clipped):
    ratio_T = double(ratio, grad=True)
    found = clipped_objective(ratio_T, double(advantage), low=0.2, high=0.28, dual=3.0)
    assert found.values_T.item() == pytest.approx(value)
    assert gradient(found.values_T, ratio_T) == [slope]
    assert (found.clipped_T.item(), found.dual_clipped_T.item()) == (clipped, dual_clipped)


def test_without_dual_clip_the_negative_side_is_unbounded():
    ratio = double(50.0, grad=True)
    found = clipped_objective(ratio, double(-2.0), low=0.2, high=0.28, dual=None)
    assert (found.values_T.item(), found.dual_clipped_T.item()) == (-100.0, False)
    assert gradient(found.values_T, ratio) == [-2.0]


@given(st.floats(0, 10), st.floats(-5, 5), st.floats(0, 0.9), st.floats(0, 2), st.one_of(st.none(), st.floats(1.01, 6)))
def test_clip_is_the_published_minimum(ratio, advantage, low, high, dual):
    expected = min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
    if dual is not None and advantage < 0:
        expected = max(expected, dual * advantage)
    found = clipped_objective(double(ratio), double(advantage), low, high, dual)
    assert found.values_T.item() == pytest.approx(expected, rel=1e-14, abs=1e-300)


@pytest.mark.parametrize("low,high", [(0.2, 0.28), (0.0, 0.0)])
@pytest.mark.parametrize("advantage", [-1.5, 1.5])
def test_gradient_is_whole_at_ratio_one(low, high, advantage):
    """The first update of a rollout sits exactly here, on the bound itself where a range is 0."""
    ratio = double(1.0, grad=True)
    objective = clipped_objective(ratio, double(advantage), low, high, dual=None)
    assert gradient(objective.values_T, ratio) == [advantage]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("token_mean", [1 / 7, 1 / 7, 0.0, 1 / 7, 0.0]),
        ("sequence_mean", [1 / 6, 1 / 6, 0.0, 1 / 3, 0.0]),
        ("constant", [1 / 30, 1 / 30, 0.0, 1 / 30, 0.0]),
        ("token_sum", [1.0, 1.0, 0.0, 1.0, 0.0]),
    ],
)
def test_token_weights(kind, expected):
    counted = torch.tensor([True, True, False, True, False])
    weights = token_weights(
        kind, counted, torch.tensor([0, 0, 0, 1, 2]), double(2.0, 1.0, 0.0), 7.0, 3.0, constant=10.0
    )
    assert weights.dtype == torch.float64
    assert weights.tolist() == pytest.approx(expected, rel=1e-15, abs=0)


@pytest.mark.parametrize("kind", ["token_mean", "sequence_mean", "constant", "token_sum"])
def test_nothing_counted_weighs_nothing(kind):
    weights = token_weights(
        kind, torch.tensor([False, False]), torch.tensor([0, 0]), double(0.0), 0.0, 0.0, constant=10.0
    )
    assert weights.tolist() == [0.0, 0.0]


def test_a_forgotten_count_shows():
    weights = token_weights("token_mean", torch.tensor([True]), torch.tensor([0]), double(1.0), 0.0, 1.0, 1.0)
    assert weights.tolist() == [math.inf]
