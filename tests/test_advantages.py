"""The advantages of GRPO's relatives: against sets written out one by one, published formulas, and exact gradients."""

import itertools
import math
import statistics

import numpy as np
import pytest
from group_case import group_of
from hypothesis import given, settings
from hypothesis import strategies as st

from megarl.algorithms.advantages import batch_normalized
from megarl.algorithms.base import AlgorithmContext
from megarl.algorithms.grpo import Grpo
from megarl.config.algorithms import GrpoSettings

REWARDS = st.lists(st.sampled_from([-1.0, 0.0, 0.25, 0.7, 1.0, 3.0]), min_size=2, max_size=7)
GROUP_ADVANTAGES = ["grpo", "rloo", "opo", "reinforce_pp_baseline", "pass_at_k", "pass_at_k_loo"]


def grpo(**chosen) -> Grpo:
    return Grpo(GrpoSettings(**chosen), AlgorithmContext(max_tokens=100, group_size=8))


def advantages(rewards, lengths=None, **chosen) -> tuple[float, ...]:
    lengths = (10,) * len(rewards) if lengths is None else lengths
    return grpo(**chosen).advantages(group_of(rewards, lengths))


def close(found, expected) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14)


@given(rewards=REWARDS)
def test_rloo_is_the_reward_less_the_mean_of_the_others(rewards):
    others = [rewards[:i] + rewards[i + 1 :] for i in range(len(rewards))]
    close(advantages(rewards, advantage="rloo"), [r - np.mean(o) for r, o in zip(rewards, others, strict=True)])


def test_opo_by_hand():
    """The baseline is (1 x 2 + 0 x 5 + 0.5 x 3) / 10 = 0.35."""
    assert advantages([1.0, 0.0, 0.5], [2, 5, 3], advantage="opo") == pytest.approx([0.65, -0.35, 0.15], rel=1e-14)
    assert advantages([1.0, 0.0], [0, 0], advantage="opo") == (0.5, -0.5)


@given(rewards=REWARDS, data=st.data())
def test_opo_sums_to_zero_over_tokens(rewards, data):
    lengths = data.draw(st.lists(st.integers(1, 50), min_size=len(rewards), max_size=len(rewards)))
    found = advantages(rewards, lengths, advantage="opo")
    assert math.fsum(a * n for a, n in zip(found, lengths, strict=True)) == pytest.approx(0.0, abs=1e-12)
    close(np.diff(found), np.diff(rewards))


def sets_of(rewards, k):
    """Every set of k samples, as their numbers, with its greatest reward."""
    return [(s, max(rewards[i] for i in s)) for s in itertools.combinations(range(len(rewards)), k)]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("estimator", ["population", "sample"])
@settings(deadline=None)
@given(rewards=REWARDS, data=st.data())
def test_pass_at_k_against_every_set(normalize, estimator, rewards, data):
    k = data.draw(st.integers(1, len(rewards) - 1))
    chosen = {"normalize_std": normalize, "std_estimator": estimator, "std_epsilon": 0.01}
    sets = sets_of(rewards, k)
    maxima = [greatest for _, greatest in sets]
    expected = np.zeros(len(rewards))
    if len(set(maxima)) > 1:
        own = [np.mean([greatest for s, greatest in sets if i in s]) for i in range(len(rewards))]
        expected = np.array(own) - np.mean(maxima)
        if normalize:
            expected = expected / (np.std(maxima, ddof=int(estimator == "sample")) + 0.01)
    close(advantages(rewards, advantage="pass_at_k", pass_k=k, **chosen), expected)


@settings(deadline=None)
@given(right=st.integers(1, 9), wrong=st.integers(1, 9), data=st.data())
def test_pass_at_k_of_two_rewards_is_the_published_formula(right, wrong, data):
    """2508.10751: of N samples M are wrong; R = 1 - C(M, k) / C(N, k) and sigma = sqrt(R (1 - R))."""
    total = right + wrong
    k = data.draw(st.integers(1, total - 1))
    found = advantages([1.0] * right + [0.0] * wrong, advantage="pass_at_k", pass_k=k, std_epsilon=0.0)
    mean = 1 - math.comb(wrong, k) / math.comb(total, k)
    sigma = math.sqrt(mean * (1 - mean))
    if sigma == 0:
        assert found == (0.0,) * total
        return
    positive = (1 - mean) / sigma
    negative = (1 - mean - math.comb(wrong - 1, k - 1) / math.comb(total - 1, k - 1)) / sigma
    close(found, [positive] * right + [negative] * wrong)


@given(rewards=REWARDS)
def test_pass_at_1_is_grpo(rewards):
    close(advantages(rewards, advantage="pass_at_k", pass_k=1), advantages(rewards))


@settings(deadline=None)
@given(rewards=REWARDS, normalize=st.booleans(), data=st.data())
def test_pass_at_k_loo_against_every_set(rewards, normalize, data):
    k = data.draw(st.integers(2, len(rewards)))
    expected = []
    for i, reward in enumerate(rewards):
        others = sets_of(rewards[:i] + rewards[i + 1 :], k - 1)
        expected.append(np.mean([max(reward, greatest) - greatest for _, greatest in others]))
    if normalize and len(set(rewards)) > 1:
        expected = np.array(expected) / (statistics.stdev(rewards) + 0.5)
    chosen = {"normalize_std": normalize, "std_estimator": "sample", "std_epsilon": 0.5}
    close(advantages(rewards, advantage="pass_at_k_loo", pass_k=k, **chosen), expected)


def test_pass_at_k_loo_with_all_samples_is_best_less_second_best():
    assert advantages([0.2, 1.0, 0.7, 0.0], advantage="pass_at_k_loo", pass_k=4) == pytest.approx([0.0, 0.3, 0.0, 0.0])
    assert advantages([1.0, 1.0, 0.0, 0.0], advantage="pass_at_k_loo", pass_k=4) == (0.0,) * 4


@pytest.mark.parametrize("advantage", ["pass_at_k", "pass_at_k_loo"])
def test_large_groups(advantage):
    """Sets are counted in whole numbers: C(2000, 1000) is no float."""
    found = advantages([1.0] + [0.0] * 1999, advantage=advantage, pass_k=1000, std_epsilon=0.0)
    best, other = {"pass_at_k": (1.0, -1 / 1999), "pass_at_k_loo": (1.0, 0.0)}[advantage]
    close(found, [best] + [other] * 1999)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
@pytest.mark.parametrize(
    ("chosen", "factor", "objective"),
    [
        # Expected reward: d p / dp. GRPO's baseline has the sample itself in it, which takes a G-th away.
        ({"advantage": "rloo"}, 1.0, lambda p: 1.0),
        ({"advantage": "grpo", "normalize_std": False}, 4 / 5, lambda p: 1.0),
        ({"advantage": "reinforce_pp_baseline"}, 4 / 5, lambda p: 1.0),
        # Pass@k: d (1 - (1 - p)^k) / dp = k (1 - p)^(k - 1), over the k of which one is the sample.
        ({"advantage": "pass_at_k_loo", "pass_k": 2}, 1 / 2, lambda p: 2 * (1 - p)),
        ({"advantage": "pass_at_k_loo", "pass_k": 5}, 1 / 5, lambda p: 5 * (1 - p) ** 4),
        ({"advantage": "pass_at_k", "pass_k": 2, "normalize_std": False}, 1 / 2 * 3 / 5, lambda p: 2 * (1 - p)),
    ],
    ids=lambda value: "" if callable(value) else str(value),
)
def test_expected_gradient(p, chosen, factor, objective):
    """Five samples, each right with probability p: the mean over samples of A_i d log P / dp, over all outcomes."""
    expected = 0.0
    for rewards in itertools.product([0.0, 1.0], repeat=5):
        slopes = [1 / p if reward else -1 / (1 - p) for reward in rewards]
        chance = math.prod(p if reward else 1 - p for reward in rewards)
        found = advantages(rewards, **chosen)
        expected += chance * sum(a * slope for a, slope in zip(found, slopes, strict=True)) / 5
    assert expected == pytest.approx(factor * objective(p), rel=1e-12)


@pytest.mark.parametrize("estimator", ["population", "sample"])
@pytest.mark.parametrize("advantage", ["reinforce_pp", "reinforce_pp_baseline"])
@given(groups=st.lists(REWARDS, min_size=1, max_size=4), data=st.data())
def test_reinforce_pp_normalises_over_the_tokens_of_the_step(estimator, advantage, groups, data):
    count = sum(map(len, groups))
    tokens = data.draw(st.lists(st.integers(1, 30), min_size=count, max_size=count))
    chosen = GrpoSettings(advantage=advantage, std_estimator=estimator, std_epsilon=0.1)
    raw = [a for rewards in groups for a in advantages(rewards, advantage=advantage, std_estimator=estimator)]
    found = batch_normalized(chosen, raw, tokens)
    plain = np.concatenate(
        [np.array(rewards) - (np.mean(rewards) if advantage == "reinforce_pp_baseline" else 0.0) for rewards in groups]
    )
    if len(set(raw)) == 1:
        assert found == (0.0,) * count
        return
    by_token = np.repeat(plain, tokens)
    std = np.std(by_token, ddof=int(estimator == "sample"))
    close(found, (plain - by_token.mean()) / (std + 0.1))


def test_reinforce_pp_by_hand():
    """Rewards 1, 0, 0 of 2, 1 and 1 tokens: mean 1/2, deviation 1/2."""
    chosen = GrpoSettings(advantage="reinforce_pp", std_epsilon=0.0)
    assert advantages([1.0, 0.0, 0.0], advantage="reinforce_pp") == (1.0, 0.0, 0.0)
    assert batch_normalized(chosen, (1.0, 0.0, 0.0), (2, 1, 1)) == (1.0, -1.0, -1.0)
    assert batch_normalized(chosen, (0.7,) * 7, (3,) * 7) == (0.0,) * 7
    assert batch_normalized(chosen, (), ()) == ()


@pytest.mark.parametrize("advantage", ["grpo", "rloo", "opo", "pass_at_k", "pass_at_k_loo"])
def test_other_advantages_do_not_depend_on_the_step(advantage):
    algorithm = grpo(advantage=advantage, pass_k=2)
    one, other = group_of([1.0, 0.0, 0.25]), group_of([0.0, 1.0, 1.0], number=1)
    assert algorithm.credit(1, [one, other])[0] == algorithm.credit(1, [one])[0]
    found = [answer.spans[0].advantage for answer in algorithm.credit(1, [one])[0].trained]
    assert tuple(found) == algorithm.advantages(one)


@pytest.mark.parametrize("advantage", GROUP_ADVANTAGES)
@pytest.mark.parametrize("reward", [0.7, 0.1, -1 / 3, 1e-300, 1e300])
@pytest.mark.parametrize("size", [2, 7, 8])
def test_equal_rewards_give_exactly_zero(advantage, reward, size):
    assert advantages([reward] * size, range(1, size + 1), advantage=advantage, pass_k=2) == (0.0,) * size


@pytest.mark.parametrize("advantage", GROUP_ADVANTAGES)
def test_a_group_of_one(advantage):
    chosen = {"advantage": advantage, "pass_k": 2}
    assert advantages([0.6], **chosen) == (0.0,)
    assert advantages([0.6], singleton_advantage="reward", **chosen) == (0.6,)
    assert advantages([0.6], advantage="reinforce_pp") == (0.6,)


@pytest.mark.parametrize("advantage", GROUP_ADVANTAGES)
@given(rewards=REWARDS, data=st.data())
def test_the_order_of_samples_does_not_matter(advantage, rewards, data):
    order = data.draw(st.permutations(range(len(rewards))))
    lengths = [3 * i + 1 for i in range(len(rewards))]
    chosen = {"advantage": advantage, "pass_k": max(2, len(rewards) - 1)}
    if advantage == "pass_at_k":
        chosen["pass_k"] = max(1, len(rewards) - 1)
    found = advantages(rewards, lengths, **chosen)
    turned = advantages([rewards[i] for i in order], [lengths[i] for i in order], **chosen)
    assert turned == tuple(found[i] for i in order)
