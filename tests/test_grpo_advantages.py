"""GRPO before the loss: shaped rewards, dropped groups, advantages, what it asks of the loop."""

import math

import numpy as np
import pytest
from group_case import group_of
from hypothesis import given, settings
from hypothesis import strategies as st

from megarl.algorithms.base import AlgorithmContext, Group
from megarl.algorithms.grpo import Grpo
from megarl.algorithms.plan import Generation, Plan
from megarl.config.algorithms import GrpoSettings
from megarl.errors import Refusal

CONTEXT = AlgorithmContext(max_tokens=100, group_size=8)


def grpo(**settings) -> Grpo:
    return Grpo(GrpoSettings(**settings), CONTEXT)


def outcome(rewards, lengths=None) -> Group:
    lengths = (10,) * len(rewards) if lengths is None else lengths
    return group_of(rewards, lengths)


OPTIONS = [
    {"normalize_std": normalize, "std_estimator": estimator, "std_epsilon": epsilon}
    for normalize in (True, False)
    for estimator in ("population", "sample")
    for epsilon in (0.0, 1e-6, 0.5)
]


@pytest.mark.parametrize("options", OPTIONS)
@settings(deadline=None)
@given(rewards=st.lists(st.sampled_from([-1.0, 0.0, 0.25, 0.7, 1.0, 3.0]), min_size=2, max_size=16))
def test_against_numpy(options, rewards):
    found = grpo(**options).advantages(outcome(rewards))
    expected = np.array(rewards) - np.mean(rewards)
    if len(set(rewards)) == 1:
        assert found == (0.0,) * len(rewards)
        return
    if options["normalize_std"]:
        ddof = 1 if options["std_estimator"] == "sample" else 0
        expected = expected / (np.std(rewards, ddof=ddof) + options["std_epsilon"])
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-15)


def test_worked_values():
    one_of_four = outcome([1.0, 0.0, 0.0, 0.0])
    root3 = math.sqrt(3.0)
    assert grpo(std_epsilon=0.0).advantages(one_of_four) == pytest.approx([root3, *[-1 / root3] * 3], rel=1e-14)
    assert grpo(std_epsilon=0.0, std_estimator="sample").advantages(one_of_four) == pytest.approx([1.5, *[-0.5] * 3])
    assert grpo(normalize_std=False).advantages(one_of_four) == (0.75, -0.25, -0.25, -0.25)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("reward", [0.7, 0.1, 0.0, -1 / 3, 1e-300, 1e300])
@pytest.mark.parametrize("size", [2, 3, 7, 8, 64])
def test_equal_rewards_give_exactly_zero(options, reward, size):
    """Seven rewards of 0.7 have a rounded mean beside 0.7; normalised, the digit would become a real advantage."""
    assert grpo(**options).advantages(outcome([reward] * size)) == (0.0,) * size


def test_tiny_differences_survive_without_epsilon():
    """The squares of these deviations are 0 in float64."""
    assert grpo(std_epsilon=0.0).advantages(outcome([0.0, 1e-200])) == pytest.approx([-1.0, 1.0])


@pytest.mark.parametrize("options", OPTIONS)
def test_a_group_of_one(options):
    assert grpo(**options).advantages(outcome([0.6])) == (0.0,)
    assert grpo(**options, singleton_advantage="reward").advantages(outcome([0.6])) == (0.6,)


def test_singleton_setting_leaves_larger_groups_alone():
    pair = outcome([1.0, 0.0])
    assert grpo(singleton_advantage="reward").advantages(pair) == grpo().advantages(pair)


# max_tokens 100, buffer 20: free up to 80, then linear to the full penalty at 100 and beyond
@pytest.mark.parametrize(
    ("length", "penalty"),
    [(1, 0.0), (79, 0.0), (80, 0.0), (81, 0.05), (90, 0.5), (99, 0.95), (100, 1.0), (101, 1.0), (500, 1.0)],
)
@pytest.mark.parametrize("factor", [1.0, 0.5, 0.0])
def test_overlong_penalty(length, penalty, factor):
    shaped = grpo(overlong_buffer=20, overlong_penalty=factor).shape_rewards(outcome([1.0, 0.0], [length, 10]))
    assert shaped == pytest.approx([1.0 - factor * penalty, 0.0], abs=1e-15)


def test_overlong_buffer_may_span_all_tokens_and_is_off_by_default():
    group = outcome([1.0, 1.0], [1, 100])
    assert grpo(overlong_buffer=100).shape_rewards(group) == pytest.approx([0.99, 0.0])
    assert grpo().shape_rewards(group) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("rewards", "kept"), [([1.0] * 8, False), ([0.0] * 8, False), ([0.7] * 7, False), ([0.0] * 7 + [1.0], True)]
)
def test_dynamic_sampling_drops_groups_of_equal_rewards(rewards, kept):
    reason = None if kept else "groups_without_variance"
    assert grpo(dynamic_sampling=True).drop_reason(outcome(rewards)) == reason
    assert grpo().drop_reason(outcome(rewards)) is None


def test_needs():
    (plain,) = grpo().objectives
    assert plain.kinds == {"answer"} and plain.old and plain.advantages
    assert not (plain.under or plain.rollout or plain.entropy_gradient or plain.together)
    assert grpo(kl_coefficient=0.01).objectives[0].under == ("reference",)
    assert grpo(entropy_coefficient=-0.01).objectives[0].entropy_gradient
    assert grpo(importance_cap=2.0).objectives[0].rollout and grpo(rejection_bounds=(0.5, 2.0)).objectives[0].rollout
    assert grpo(dynamic_sampling=True, max_generation_batches=4).plan(1).batches == 4
    assert grpo(max_generation_batches=4).plan(1) == Plan((Generation(CONTEXT.group_size),))


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ((), "a group without answers"),
        ((1.0, None), "reward None of sample 1: must be finite"),
        ((1.0, math.nan), "reward nan of sample 1: must be finite"),
        ((math.inf,), "reward inf of sample 0: must be finite"),
    ],
)
def test_refused_rewards(rewards, message):
    with pytest.raises(Refusal, match=message):
        grpo().credit(1, [group_of(rewards)])
