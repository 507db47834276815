"""KL estimators: values, and what their gradients mean, by enumerating a small vocabulary."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megarl.ops.kl import kl_estimate
from megarl.ops.ratios import k3_from_log_ratio


def estimate(log_probs, reference, kind, clamp=20.0, cap=None):
    return kl_estimate(log_probs, reference, kind, clamp, cap)


def double(*values, grad=False):
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


@pytest.mark.parametrize(
    ("kind", "value", "slope"),
    [
        ("k1", lambda d: d, lambda d: 1.0),
        ("k2", lambda d: d * d / 2, lambda d: d),
        ("k3", lambda d: math.exp(-d) - 1 + d, lambda d: 1 - math.exp(-d)),
        ("k1+", lambda d: d, lambda d: d),
        ("k3+", lambda d: math.exp(-d) - 1 + d, lambda d: d),
    ],
)
def test_value_and_gradient(kind, value, slope):
    differences = (-2.0, -0.3, 0.0, 0.4, 3.0)
    reference = double(-1.0, -2.0, -0.5, -3.0, -4.0)
    log_probs = (reference + double(*differences)).requires_grad_()
    found = estimate(log_probs, reference, kind)
    torch.testing.assert_close(found.detach(), double(*(value(d) for d in differences)))
    torch.testing.assert_close(torch.autograd.grad(found.sum(), log_probs)[0], double(*(slope(d) for d in differences)))
    if not kind.endswith("+"):
        assert torch.autograd.gradcheck(lambda x: estimate(x, reference, kind), (log_probs,))


@pytest.mark.parametrize(
    ("kind", "difference", "clamp", "cap", "value", "slope"),
    [
        ("k1", 5.0, 20.0, 2.0, 2.0, 0.0),
        ("k1", -5.0, 20.0, 2.0, -2.0, 0.0),
        ("k1", 50.0, 20.0, None, 50.0, 1.0),  # no exp, no clamp
        ("k2", 3.0, 20.0, 4.0, 4.0, 0.0),
        ("k2", 30.0, 20.0, None, 450.0, 30.0),
        ("k3", -3.0, 20.0, 10.0, 10.0, 0.0),
        ("k3", -3.0, 20.0, 30.0, math.exp(3) - 4, 1 - math.exp(3)),
        ("k3", -30.0, 2.0, None, math.exp(2) - 3, 0.0),
        ("k3", 30.0, 2.0, None, math.exp(-2) + 1, 0.0),
        ("k1+", 5.0, 20.0, 2.0, 2.0, 0.0),
        ("k1+", -5.0, 20.0, None, -5.0, -5.0),
        ("k3+", -3.0, 20.0, 10.0, 10.0, 0.0),
        ("k3+", -3.0, 20.0, 30.0, math.exp(3) - 4, -3.0),
        ("k3+", -30.0, 2.0, None, math.exp(2) - 3, -30.0),  # the clamp is k3's, the gradient k2's
    ],
)
def test_clamp_and_cap_bound_value_and_stop_gradient(kind, difference, clamp, cap, value, slope):
    log_probs = double(difference, grad=True)
    found = estimate(log_probs, double(0.0), kind, clamp, cap)
    assert found.item() == pytest.approx(value, rel=1e-14)
    assert torch.autograd.grad(found, log_probs)[0].item() == pytest.approx(slope, rel=1e-14)


def test_the_reference_is_a_constant():
    reference = double(-1.0, grad=True)
    for kind in ("k1", "k2", "k3", "k1+", "k3+"):
        assert not estimate(double(-2.0), reference, kind).requires_grad


@given(st.floats(-20, 20, width=32), st.sampled_from([torch.float32, torch.float64]))
def test_k3_is_never_negative(log_ratio, dtype):
    assert k3_from_log_ratio(torch.tensor(log_ratio, dtype=dtype)).item() >= 0


def test_k3_keeps_its_digits_near_zero():
    # In float32, exp(x) - 1 - x is wrong in its first digits here.
    assert k3_from_log_ratio(torch.tensor(1e-3)).item() == pytest.approx(5.00167e-7, rel=1e-3)


@pytest.fixture
def vocabulary():
    """Logits of a policy over five tokens, and the log-probs of a reference."""
    logits = double(0.3, -1.0, 0.8, 0.1, -0.4, grad=True)
    return logits, torch.log_softmax(double(-0.2, 0.5, 0.4, -0.9, 0.0), 0)


@pytest.mark.parametrize("kind", ["k1", "k3", "k1+", "k3+"])
def test_expected_value_is_the_divergence(vocabulary, kind):
    logits, reference = vocabulary
    log_probs = torch.log_softmax(logits, 0)
    expected = (log_probs.exp() * (log_probs - reference)).sum()
    torch.testing.assert_close((log_probs.exp() * estimate(log_probs, reference, kind)).sum(), expected)


def test_expected_gradients(vocabulary):
    """k1: 0; k2, k1+ and k3+: that of KL(policy || reference); k3: that of KL(reference || policy)."""
    logits, reference = vocabulary

    def gradient(of):
        return torch.autograd.grad(of(torch.log_softmax(logits, 0)), logits)[0]

    def of_estimator(kind):
        return gradient(lambda lp: (lp.detach().exp() * estimate(lp, reference, kind)).sum())

    probs = torch.softmax(logits.detach(), 0)
    difference = probs.log() - reference
    reverse = probs * (difference - (probs * difference).sum())  # d KL(policy || reference) / d logits
    forward = probs - reference.exp()  # d KL(reference || policy) / d logits
    torch.testing.assert_close(gradient(lambda lp: (lp.exp() * (lp - reference)).sum()), reverse)
    torch.testing.assert_close(of_estimator("k1"), torch.zeros_like(reverse), atol=1e-15, rtol=0)
    for kind in ("k2", "k1+", "k3+"):
        torch.testing.assert_close(of_estimator(kind), reverse)
    torch.testing.assert_close(of_estimator("k3"), forward)
    assert not torch.allclose(forward, reverse)
