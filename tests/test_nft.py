"""NFT: its identities with GRPO, Dr. GRPO and supervised training on right answers."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_case import double, logged_sums, take
from nft_case import (
    AGGREGATIONS,
    CONTEXT,
    LEVELS,
    MIXED,
    UNMIXED,
    Groups,
    make_batch,
    nft,
    outcome,
    rewards_of_tokens,
    signalled,
)

from megarl.algorithms.grpo import Grpo
from megarl.algorithms.nft import Nft
from megarl.algorithms.objective import BatchTotals, LossInputs
from megarl.algorithms.sft import Sft
from megarl.config.algorithms import GrpoSettings, SftSettings


def grpo(**chosen) -> Grpo:
    return Grpo(GrpoSettings(**{"std_epsilon": 0.0, **chosen}), CONTEXT)


def nft_gradient(algorithm: Nft, groups: Groups, inputs: LossInputs) -> torch.Tensor:
    loss = algorithm.loss(signalled(algorithm, groups, inputs)).loss
    return torch.autograd.grad(loss, inputs.log_probs_T)[0]


def grpo_gradient(algorithm: Grpo, groups: Groups, inputs: LossInputs) -> torch.Tensor:
    advantages_S = double([x for rewards in groups for x in algorithm.advantages(outcome(rewards))])
    loss = algorithm.loss(replace(inputs, advantages_T=advantages_S[inputs.sequence_T])).loss
    return torch.autograd.grad(loss, inputs.log_probs_T)[0]


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize("aggregation", AGGREGATIONS, ids=lambda each: each["aggregation"])
@pytest.mark.parametrize("epsilon", [1.0, 0.9, 1e-6])
@pytest.mark.parametrize("level", LEVELS)
def test_n1_on_policy_with_sqrt_odds_is_grpo(aggregation, epsilon, level):
    batch = make_batch(MIXED)
    found = nft_gradient(
        nft(prompt_weight="sqrt_odds", epsilon=epsilon, ratio_level=level, **aggregation), MIXED, batch
    )
    assert_same(found, grpo_gradient(grpo(**aggregation), MIXED, batch))
    assert found.count_nonzero() == len(found)


def test_n1_with_the_sample_deviation_is_grpo_times_a_factor():
    batch = make_batch(MIXED)
    found = nft_gradient(nft(prompt_weight="sqrt_odds", aggregation="token_mean"), MIXED, batch)
    factor_G = double([math.sqrt(len(rewards) / (len(rewards) - 1)) for rewards in MIXED])
    assert batch.group_S is not None
    factor_T = factor_G[batch.group_S][batch.sequence_T]
    assert_same(found, factor_T * grpo_gradient(grpo(std_estimator="sample"), MIXED, batch))


def test_n1_fails_with_epsilon_above_1():
    """The bound then acts on-policy, and weakens the wrong answers alone."""
    batch = make_batch(MIXED)
    found = nft_gradient(nft(prompt_weight="sqrt_odds", epsilon=1.7, aggregation="token_mean"), MIXED, batch)
    expected = grpo_gradient(grpo(), MIXED, batch)
    right_T = rewards_of_tokens(MIXED, batch) == 1
    assert_same(found, torch.where(right_T, expected, expected / 1.7))
    assert (found - expected).norm() > 0.1 * expected.norm()


@settings(max_examples=50, deadline=None)
@given(
    groups=st.lists(st.lists(st.sampled_from([0.0, 1.0]), min_size=2, max_size=16), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
)
def test_n1_and_n2_for_any_groups(groups, seed):
    """With both kinds of weight, unmixed groups among them."""
    batch = make_batch(groups, seed)
    for weight, normalize in (("sqrt_odds", True), ("one_minus_rate", False)):
        chosen = nft(prompt_weight=weight, aggregation="token_mean", rate_clamp=0.0)
        assert_same(nft_gradient(chosen, groups, batch), grpo_gradient(grpo(normalize_std=normalize), groups, batch))


@pytest.mark.parametrize("aggregation", AGGREGATIONS, ids=lambda each: each["aggregation"])
@pytest.mark.parametrize("level", LEVELS)
def test_n2_on_policy_with_one_minus_rate_is_dr_grpo(aggregation, level):
    batch = make_batch(MIXED)
    found = nft_gradient(nft(ratio_level=level, **aggregation), MIXED, batch)
    assert_same(found, grpo_gradient(grpo(normalize_std=False, **aggregation), MIXED, batch))


def test_n2_holds_for_continuous_rewards_too():
    """(1 - r) (R - (1 - R) r / (1 - r)) = R - r, Dr. GRPO's advantage, whatever the reward R."""
    groups = ((0.3, 0.9, 0.0), (0.25, 0.5), (1.0, 0.1, 0.1, 0.7))
    batch = make_batch(groups)
    found = nft_gradient(nft(rewards="continuous", aggregation="token_mean"), groups, batch)
    assert_same(found, grpo_gradient(grpo(normalize_std=False), groups, batch))


@pytest.mark.parametrize("prompt_weight", ["one_minus_rate", "sqrt_odds", "one"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_n3_on_policy_every_token_has_the_loss_0_and_a_gradient(prompt_weight, dtype):
    algorithm = nft(prompt_weight=prompt_weight)
    whole = signalled(algorithm, MIXED, make_batch(MIXED))
    whole = replace(
        whole,
        log_probs_T=whole.log_probs_T.detach().to(dtype).requires_grad_(),
        signals_S={name: values.to(dtype) for name, values in whole.signals_S.items()},
        lengths_S=whole.lengths_S.to(dtype),
    )
    whole = replace(whole, old_log_probs_T=whole.log_probs_T)
    wrong = (rewards_of_tokens(MIXED, whole) == 0).sum()
    sums = logged_sums(algorithm.loss(whole))
    assert sums["straight_through_share"].item() == 0.0
    assert sums["implicit_negative_mean"].item() == sums["wrong_share"].item() == float(wrong)
    for token in range(len(whole.mask_T)):
        loss = algorithm.loss(take(whole, torch.tensor([token]))).loss
        assert loss.item() == 0.0
        assert torch.autograd.grad(loss, whole.log_probs_T)[0][token] != 0


@pytest.mark.parametrize("weight", ["one_minus_rate", "sqrt_odds", "one"])
@pytest.mark.parametrize("log_ratio", [-30.0, -1.0, -0.1, 0.0, 0.2, 0.6, 1.0, 1.5, 9.9])
def test_n4_right_answers_keep_their_weight_and_wrong_ones_are_never_amplified(weight, log_ratio):
    """Wrong answers, epsilon 1: d loss / d ratio is -A min(1, (1 - r) / (1 - r R)), and -A where 1 - r R <= 0."""
    groups, rate = ((1.0, 0.0, 0.0, 1.0, 0.0),), 0.4
    batch = make_batch(groups)
    log_probs = (batch.log_probs_T.detach() + log_ratio).requires_grad_()
    algorithm = nft(prompt_weight=weight, aggregation="token_mean")
    gradient = nft_gradient(algorithm, groups, replace(batch, log_probs_T=log_probs)) * batch.totals.tokens
    omega = algorithm.signals(outcome(groups[0]))["prompt_weight"][0]
    advantage, ratio = -omega * rate / (1 - rate), math.exp(log_ratio)
    factor = min(1.0, (1 - rate) / (1 - rate * ratio)) if rate * ratio < 1 else 1.0
    right_T = rewards_of_tokens(groups, batch) == 1
    expected = torch.where(right_T, double([-omega]), double([-advantage * factor * ratio]))
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=0)
    assert 0 < factor <= 1


@pytest.mark.parametrize("spread", [0.0, 0.5])
def test_without_the_negative_part_it_is_supervised_training_on_right_answers_of_mixed_groups(spread):
    """RFT. Both are means, over all tokens here and over those of the right answers there."""
    groups = (*UNMIXED, *MIXED)
    algorithm = nft(
        negative_weight=0.0, prompt_weight="one", aggregation="token_mean", dynamic_sampling=False, log_ratio_clamp=50.0
    )
    inputs = make_batch(groups, seed=6, spread=spread)
    right_T = (rewards_of_tokens(groups, inputs) == 1) & (inputs.sequence_T >= 5)
    num_right = float(right_T.sum())
    supervised = replace(inputs, mask_T=right_T.double(), totals=BatchTotals(num_right, 1.0))
    loss = Sft(SftSettings(), CONTEXT).loss(supervised).loss
    expected = torch.autograd.grad(loss, inputs.log_probs_T)[0]
    found = nft_gradient(algorithm, groups, inputs)
    assert_same(found * inputs.totals.tokens / num_right, expected)


@pytest.mark.parametrize("level", LEVELS)
def test_continuous_rewards_of_two_values_are_binary_ones(level):
    binary, continuous = nft(ratio_level=level), nft(ratio_level=level, rewards="continuous")
    inputs = make_batch(MIXED, seed=7, spread=0.5)
    assert binary.signals(outcome(MIXED[0])) == continuous.signals(outcome(MIXED[0]))
    found, expected = (nft_gradient(each, MIXED, inputs) for each in (continuous, binary))
    assert torch.equal(found, expected)
    assert found.count_nonzero() > 0
