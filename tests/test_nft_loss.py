"""NFT's loss: value and gradient in closed form, extreme ratios, groups without a signal, micro-batches."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_case import CONSTANTS, assert_micro_batches_add_up, by_sequence, double, log_ratios, logged_sums, take
from nft_case import (
    AGGREGATIONS,
    LEVELS,
    MIXED,
    UNMIXED,
    make_batch,
    nft,
    signalled,
)

from megarl.algorithms.objective import BatchTotals, LossInputs
from megarl.config.algorithms import NftSettings
from megarl.ops.implicit_negative import implicit_negative


def reference_loss(s: NftSettings, b: LossInputs, signals: dict[str, list[float]]):
    """Loss, its gradient in the log-probs and the logged sums, token by token with plain floats."""
    lp, old = (getattr(b, name).tolist() for name in ("log_probs_T", "old_log_probs_T"))
    tokens = [t for t, m in enumerate(b.mask_T.tolist()) if m == 1.0]
    members = {i: [t for t in tokens if b.sequence_T[t] == i] for i in range(b.num_sequences)}
    divisor = b.totals.tokens if s.aggregation == "token_mean" else b.num_sequences * s.aggregation_constant
    loss, gradient = 0.0, [0.0] * len(lp)
    sums = dict.fromkeys(
        ("ratio_mean", "kl_old_k3", "wrong_share", "implicit_negative_mean", "straight_through_share"), 0.0
    )
    for t in tokens:
        index = int(b.sequence_T[t])
        averaged = members[index] if s.ratio_level == "sequence" else [t]
        mean = sum(lp[u] - old[u] for u in averaged) / len(averaged)
        d = min(mean, s.log_ratio_clamp)
        reward, rate, omega = (signals[name][index] for name in ("reward", "success_rate", "prompt_weight"))
        fraction = (1 - rate * math.exp(d)) / (1 - rate)
        bounded = max(fraction, s.epsilon)
        loss -= omega * (reward * d + s.negative_weight * (1 - reward) * math.log(bounded)) / divisor
        if mean <= s.log_ratio_clamp:
            slope = reward - s.negative_weight * (1 - reward) * rate / (1 - rate) * math.exp(d) / bounded
            for u in averaged:
                gradient[u] -= omega * slope / len(averaged) / divisor
        y = min(lp[t] - old[t], s.log_ratio_clamp)
        sums["ratio_mean"] += math.exp(d)
        sums["kl_old_k3"] += math.exp(y) - 1 - y
        if omega > 0:
            sums["wrong_share"] += 1 - reward
            sums["implicit_negative_mean"] += (1 - reward) * bounded
            sums["straight_through_share"] += fraction < s.epsilon and reward < 1
    return loss, double(gradient), sums


GROUP = st.lists(st.sampled_from([0.0, 1.0]), min_size=2, max_size=6)
FRACTIONS = st.lists(st.sampled_from([0.0, 0.1, 0.5, 0.7, 1.0]), min_size=2, max_size=6)


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    groups=st.one_of(*(st.lists(group, min_size=1, max_size=4) for group in (GROUP, FRACTIONS))),
    masked_share=st.sampled_from([0.0, 0.3, 0.9]),
    spread=st.sampled_from([0.05, 0.5, 2.0]),
    chosen=st.fixed_dictionaries(
        {},
        optional={
            "prompt_weight": st.sampled_from(["one_minus_rate", "sqrt_odds", "one"]),
            "epsilon": st.floats(0.05, 2.0),
            "negative_weight": st.floats(0.0, 3.0),
            "rate_clamp": st.floats(0.0, 0.4),
            "ratio_level": st.sampled_from(LEVELS),
            "log_ratio_clamp": st.floats(0.3, 12.0),
            "aggregation": st.sampled_from(["constant", "token_mean"]),
            "aggregation_constant": st.floats(0.5, 2000.0),
        },
    ),
)
def test_value_gradient_and_logs_against_the_reference(seed, groups, masked_share, spread, chosen):
    algorithm = nft(rewards="continuous", **chosen)
    inputs = signalled(algorithm, groups, make_batch(groups, seed, spread, masked_share))
    terms = algorithm.loss(inputs)
    signals = {name: values.tolist() for name, values in inputs.signals_S.items()}
    loss, gradient, sums = reference_loss(algorithm.settings, inputs, signals)
    scale = 1.0 + gradient.norm().item()
    assert terms.loss.item() == pytest.approx(loss, rel=1e-10, abs=1e-12 * scale)
    found = torch.autograd.grad(terms.loss, inputs.log_probs_T)[0]
    torch.testing.assert_close(found, gradient, rtol=1e-10, atol=1e-13 * scale)
    assert {name: value.item() for name, value in logged_sums(terms).items()} == pytest.approx(
        sums, rel=1e-10, abs=1e-11
    )


def test_worked_example():
    """One prompt, r = 1/2, three wrong tokens at R = 1/2, 3/2 and 3, one right token at R = 2; epsilon 1/4."""
    algorithm = nft(epsilon=0.25, prompt_weight="one", aggregation="token_mean")
    old = [math.log(0.2)] * 4
    inputs = LossInputs(
        log_probs_T=double([math.log(0.1), math.log(0.3), math.log(0.6), math.log(0.4)], grad=True),
        entropy_T=double([0.1, 0.2, 0.3, 0.4]),
        old_log_probs_T=double(old),
        mask_T=double([1.0] * 4),
        sequence_T=torch.tensor([0, 0, 0, 1]),
        num_sequences=2,
        lengths_S=double([3.0, 1.0]),
        totals=BatchTotals(tokens=4.0, sequences=2.0),
    )
    inputs = signalled(algorithm, ((0, 1),), inputs)
    terms = algorithm.loss(inputs)
    # x = (1 - R/2) / (1/2) = 2 - R: 3/2, 1/2, and -1, which counts as 1/4
    assert terms.loss.item() == pytest.approx(-(math.log(1.5) + math.log(0.5) + math.log(0.25) + math.log(2)) / 4)
    gradient = torch.autograd.grad(terms.loss, inputs.log_probs_T)[0]
    assert gradient.tolist() == pytest.approx([0.5 / 1.5 / 4, 1.5 / 0.5 / 4, 3 / 0.25 / 4, -1 / 4])
    assert {name: value.item() for name, value in logged_sums(terms).items()} == pytest.approx(
        {
            "ratio_mean": 7.0,
            "kl_old_k3": 7.0 - 4.0 - math.log(0.5 * 1.5 * 3 * 2),
            "wrong_share": 3.0,
            "implicit_negative_mean": 2.25,
            "straight_through_share": 1.0,
        }
    )


@pytest.mark.parametrize("level", LEVELS)
def test_gradcheck_where_the_bound_does_not_act(level):
    algorithm = nft(epsilon=0.1, ratio_level=level, aggregation="token_mean")
    groups = ((1, 0, 0, 0), (1, 0))
    inputs = signalled(algorithm, groups, make_batch(groups, seed=3))
    log_probs = double([x + 0.2 * (-1) ** t for t, x in enumerate(inputs.log_probs_T.tolist())], grad=True)

    def loss(log_probs_T):
        return algorithm.loss(replace(inputs, log_probs_T=log_probs_T)).loss

    assert logged_sums(algorithm.loss(replace(inputs, log_probs_T=log_probs)))["straight_through_share"].item() == 0
    assert torch.autograd.gradcheck(loss, (log_probs,))


def test_gradient_passes_where_the_bound_holds_the_value():
    """There the value stands still, so a gradcheck must fail, and yet the token is pushed down."""
    log_ratio = double([0.5], grad=True)

    def value(log_ratio_T):
        return implicit_negative(log_ratio_T, double([0.5]), epsilon=1.0).log_ratios_T

    assert value(log_ratio).item() == value(log_ratio + 0.1).item() == 0.0
    assert torch.autograd.grad(value(log_ratio), log_ratio)[0].item() == pytest.approx(-math.exp(0.5))
    assert not torch.autograd.gradcheck(value, (log_ratio,), raise_exception=False)


def test_what_is_left_of_the_old_policy_is_a_distribution():
    """r policy + (1 - r) negative = old, over a vocabulary: the negative's ratios average to 1 under the old policy."""
    generator = torch.Generator().manual_seed(5)
    old = torch.randn(50, generator=generator, dtype=torch.float64).log_softmax(0)
    policy = (old + 0.1 * torch.randn(50, generator=generator, dtype=torch.float64)).log_softmax(0)
    for rate in (0.02, 0.3, 0.6):
        found = implicit_negative(policy - old, torch.full_like(old, rate), epsilon=1e-6)
        assert not found.floored_T.any()
        negative = found.log_ratios_T.exp() * old.exp()
        torch.testing.assert_close(rate * policy.exp() + (1 - rate) * negative, old.exp(), rtol=1e-13, atol=0)
        assert negative.sum().item() == pytest.approx(1.0, rel=1e-13)


EXTREMES = [-1e4, -200.0, -88.0, -1e-9, 0.0, 1e-9, 0.3, 0.7, 3.0, 9.99, 10.01, 50.0, 89.0, 1e4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("epsilon", [1.0, 1e-6])
@pytest.mark.parametrize("clamp", [10.0, 50.0])
@pytest.mark.parametrize("rate", [1e-6, 0.02, 0.5, 0.98, 1 - 1e-6])
@pytest.mark.parametrize("reward", [0.0, 0.4, 1.0])
def test_n5_any_ratio_has_a_finite_value_and_gradient(dtype, epsilon, clamp, rate, reward):
    """Far above 1 / r the fraction is negative, far below exp underflows."""
    algorithm = nft(rewards="continuous", epsilon=epsilon, log_ratio_clamp=clamp)
    num = len(EXTREMES)
    inputs = LossInputs(
        log_probs_T=torch.tensor(EXTREMES, dtype=dtype, requires_grad=True),
        entropy_T=torch.zeros(num, dtype=dtype),
        old_log_probs_T=torch.zeros(num, dtype=dtype),
        mask_T=torch.ones(num, dtype=dtype),
        sequence_T=torch.arange(num),
        num_sequences=num,
        lengths_S=torch.ones(num, dtype=dtype),
        signals_S={
            name: torch.full((num,), value, dtype=dtype)
            for name, value in (("reward", reward), ("success_rate", rate), ("prompt_weight", 1.0))
        },
        totals=BatchTotals(float(num), float(num)),
    )
    terms = algorithm.loss(inputs)
    gradient = torch.autograd.grad(terms.loss, inputs.log_probs_T)[0]
    assert terms.loss.isfinite() and gradient.isfinite().all()
    assert all(value.isfinite() for value in logged_sums(terms).values())
    beyond_T = inputs.log_probs_T.detach() > clamp
    assert gradient[beyond_T].tolist() == [0.0] * int(beyond_T.sum())
    if reward == 0.0:
        # Wrong answers are pushed down, also where the fraction is negative.
        between_T = ~beyond_T & (inputs.log_probs_T.detach() > -20)
        assert (gradient[between_T] > 0).all()


@pytest.mark.parametrize("epsilon", [1e-6, 0.1, 1.0])
def test_the_bound_is_exact_beside_a_large_fraction(epsilon):
    """x = 1 - 49 (e^10 - 1) = -1.08e6: in float32 (max - x) + x would be 0.125 for 0.1, and 0 for 1e-6."""
    found = implicit_negative(torch.tensor([10.0]), torch.tensor([0.98]), epsilon)
    assert found.log_ratios_T.item() == torch.tensor(epsilon).log().item()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("junk", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_n5_masked_tokens_may_hold_anything(level, junk):
    algorithm = nft(ratio_level=level)
    clean = signalled(algorithm, MIXED, make_batch(MIXED, seed=2, spread=0.5, masked_share=0.4))
    masked = torch.nonzero(clean.mask_T == 0)[:, 0]
    assert len(masked) > 5
    spoilt: dict[str, Any] = {
        name: getattr(clean, name).detach().index_fill(0, masked, junk)
        for name in ("log_probs_T", *CONSTANTS)
        if getattr(clean, name) is not None
    }
    dirty = replace(clean, **spoilt | {"log_probs_T": spoilt["log_probs_T"].requires_grad_()})
    clean_terms, dirty_terms = algorithm.loss(clean), algorithm.loss(dirty)
    clean_grad = torch.autograd.grad(clean_terms.loss, clean.log_probs_T)[0]
    dirty_grad = torch.autograd.grad(dirty_terms.loss, dirty.log_probs_T)[0]
    assert dirty_terms.loss.item() == clean_terms.loss.item() != 0.0
    assert torch.equal(dirty_grad, clean_grad)
    assert dirty_grad[masked].count_nonzero() == 0
    assert logged_sums(dirty_terms) == logged_sums(clean_terms)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("totals", [BatchTotals(0.0, 0.0), BatchTotals(100.0, 20.0)])
def test_a_batch_without_counted_tokens_is_exactly_zero(level, totals):
    algorithm = nft(ratio_level=level)
    inputs = signalled(algorithm, MIXED, make_batch(MIXED, spread=0.5))
    inputs = replace(inputs, mask_T=inputs.mask_T * 0, lengths_S=inputs.lengths_S * 0, totals=totals)
    terms = algorithm.loss(inputs)
    assert terms.loss.item() == 0.0
    assert torch.autograd.grad(terms.loss, inputs.log_probs_T)[0].count_nonzero() == 0
    assert {value.item() for value in logged_sums(terms).values()} == {0.0}


@pytest.mark.parametrize("weight", ["one_minus_rate", "sqrt_odds", "one"])
@pytest.mark.parametrize("rate_clamp", [0.0, 0.02])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("far", [0.0, 1e4, -1e4])
def test_n6_groups_all_right_or_all_wrong_contribute_exactly_nothing(weight, rate_clamp, level, far):
    """Also where dynamic_sampling is off and the ratios are out of any range."""
    algorithm = nft(prompt_weight=weight, rate_clamp=rate_clamp, ratio_level=level, dynamic_sampling=False)
    groups = (*UNMIXED, *MIXED)
    inputs = make_batch(groups, seed=4, spread=0.5)
    unmixed_T = inputs.sequence_T < 5
    log_probs = (inputs.log_probs_T.detach() + far * unmixed_T).requires_grad_()
    inputs = signalled(algorithm, groups, replace(inputs, log_probs_T=log_probs))
    assert inputs.signals_S["prompt_weight"][:5].tolist() == [0.0] * 5
    assert (inputs.signals_S["prompt_weight"][5:] > 0).all()
    gradient = torch.autograd.grad(algorithm.loss(inputs).loss, log_probs)[0]
    assert gradient[unmixed_T].count_nonzero() == 0
    assert gradient[~unmixed_T].count_nonzero() > 0
    alone = algorithm.loss(take(inputs, torch.nonzero(unmixed_T)[:, 0]))
    assert alone.loss.item() == 0.0
    assert [logged_sums(alone)[name].item() for name in ("wrong_share", "implicit_negative_mean")] == [0.0, 0.0]
    assert logged_sums(alone)["straight_through_share"].item() == 0.0


@pytest.mark.parametrize("aggregation", AGGREGATIONS, ids=lambda each: each["aggregation"])
@pytest.mark.parametrize("level", LEVELS)
@settings(max_examples=25, deadline=None)
@given(
    groups=st.lists(FRACTIONS, min_size=1, max_size=3),
    owners=st.lists(st.integers(0, 2), min_size=18, max_size=18),
    seed=st.integers(0, 1000),
)
def test_micro_batches_add_up_to_the_whole(aggregation, level, groups, owners, seed):
    """However the sequences are spread over ranks and micro-batches."""
    algorithm = nft(rewards="continuous", epsilon=0.3, ratio_level=level, **aggregation)
    whole = signalled(algorithm, groups, make_batch(groups, seed, spread=0.5, masked_share=0.2))
    assert_micro_batches_add_up(algorithm, whole, by_sequence(whole, owners))


@pytest.mark.parametrize("level", LEVELS)
def test_the_current_log_probs_may_stand_for_the_old_ones(level):
    algorithm = nft(ratio_level=level)
    inputs = signalled(algorithm, MIXED, make_batch(MIXED))
    found = algorithm.loss(replace(inputs, old_log_probs_T=inputs.log_probs_T)).loss
    expected = algorithm.loss(inputs).loss
    gradients = [torch.autograd.grad(loss, inputs.log_probs_T)[0] for loss in (found, expected)]
    assert torch.equal(*gradients) and gradients[0].count_nonzero() > 0
    assert log_ratios(inputs).count_nonzero() == 0


def test_missing_old_log_probs_are_named():
    inputs = signalled(nft(), MIXED, make_batch(MIXED))
    with pytest.raises(ValueError, match=r"LossInputs.old_log_probs_T is None"):
        nft().loss(replace(inputs, old_log_probs_T=None))
