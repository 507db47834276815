"""NFT before the loss: dropped groups, signals, what it asks of the loop, and the runs that it refuses."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from group_case import group_of
from hypothesis import given, settings
from hypothesis import strategies as st
from nft_case import nft

from megarl.algorithms.base import Group
from megarl.algorithms.nft import RATE_MARGIN
from megarl.config.load import load_config
from megarl.config.rules import broken_rules
from megarl.errors import Refusal


def outcome(*rewards: float) -> Group:
    return group_of(rewards)


NOT_BINARY, OUT_OF_RANGE = "groups_reward_not_binary", "groups_reward_out_of_range"
RIGHT, WRONG, EQUAL = "groups_all_right", "groups_all_wrong", "groups_without_variance"


@pytest.mark.parametrize(
    ("rewards", "binary", "binary_without", "continuous", "continuous_without"),
    [
        ((1.0, 0.0), None, None, None, None),
        ((1.0, 1.0), RIGHT, None, EQUAL, None),
        ((0.0, 0.0), WRONG, None, EQUAL, None),
        ((0.5, 0.5), NOT_BINARY, NOT_BINARY, EQUAL, None),
        ((1.0, 0.5), NOT_BINARY, NOT_BINARY, None, None),
        ((1.0, 0.0, 1 - 1e-15), NOT_BINARY, NOT_BINARY, None, None),
        ((1.0, -1.0), NOT_BINARY, NOT_BINARY, OUT_OF_RANGE, OUT_OF_RANGE),
        ((0.0, 1.5), NOT_BINARY, NOT_BINARY, OUT_OF_RANGE, OUT_OF_RANGE),
        ((2.0, 2.0), NOT_BINARY, NOT_BINARY, OUT_OF_RANGE, OUT_OF_RANGE),
    ],
)
def test_dropped_groups_and_why(rewards, binary, binary_without, continuous, continuous_without):
    """With and without dynamic_sampling."""
    group = outcome(*rewards)
    assert nft().drop_reason(group) == binary
    assert nft(dynamic_sampling=False).drop_reason(group) == binary_without
    assert nft(rewards="continuous").drop_reason(group) == continuous
    assert nft(rewards="continuous", dynamic_sampling=False).drop_reason(group) == continuous_without


@pytest.mark.parametrize(
    ("kind", "weight"),
    [("one_minus_rate", lambda r: 1 - r), ("sqrt_odds", lambda r: math.sqrt((1 - r) / r)), ("one", lambda r: 1.0)],
)
def test_signals(kind, weight):
    """The rate in the weight is the clamped one, as in the published code."""
    rare = (1.0, *[0.0] * 99)
    for rewards, rate in (((1.0, 0.0, 0.0, 0.0), 0.25), (rare, 0.02), (tuple(1 - r for r in rare), 0.98)):
        found = nft(prompt_weight=kind).signals(outcome(*rewards))
        assert found.keys() == {"reward", "success_rate", "prompt_weight"}
        assert found["reward"] == rewards
        assert found["success_rate"] == (rate,) * len(rewards)
        assert found["prompt_weight"] == pytest.approx((weight(rate),) * len(rewards), rel=1e-15)


@pytest.mark.parametrize("kind", ["one_minus_rate", "sqrt_odds", "one"])
@pytest.mark.parametrize("rate_clamp", [0.0, 0.02, 0.4])
@pytest.mark.parametrize("reward", [0.0, 0.1, 0.7, 1.0])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_equal_rewards_weigh_exactly_nothing(kind, rate_clamp, reward, size):
    """Also where dynamic_sampling is off, and whatever the rounded mean of seven times 0.7 is."""
    algorithm = nft(prompt_weight=kind, rate_clamp=rate_clamp, rewards="continuous", dynamic_sampling=False)
    assert algorithm.signals(outcome(*[reward] * size))["prompt_weight"] == (0.0,) * size


@settings(deadline=None)
@given(
    rewards=st.lists(st.floats(0, 1), min_size=1, max_size=8),
    kind=st.sampled_from(["one_minus_rate", "sqrt_odds", "one"]),
    rate_clamp=st.sampled_from([0.0, 1e-9, 0.02]),
)
def test_rates_leave_room_for_finite_odds_in_float32(rewards, kind, rate_clamp):
    found = nft(prompt_weight=kind, rate_clamp=rate_clamp, rewards="continuous").signals(outcome(*rewards))
    margin = max(rate_clamp, RATE_MARGIN)
    assert all(margin <= rate <= 1 - margin for rate in found["success_rate"])
    assert all(0 <= weight <= 1 / math.sqrt(margin) for weight in found["prompt_weight"])


def test_needs():
    (answers,) = nft().objectives
    assert answers.old and not (answers.under or answers.advantages)
    assert nft().plan(1).batches == 10
    assert nft(max_generation_batches=4).plan(1).batches == 4
    assert nft(dynamic_sampling=False, max_generation_batches=4).plan(1).batches == 1


REFUSED = [
    (
        "reward.low=-1",
        "reward.low=-1, reward.high=1: must be 0 and 1, since NFT reads a reward as the probability of being right. "
        "Fix: remove both settings.",
    ),
    (
        "reward.kind=f1",
        "algorithm.rewards=binary with reward.kind=f1: needs rewards that are 0 or 1. "
        "Fix: set algorithm.rewards=continuous.",
    ),
    (
        "rollout.group_size=1",
        "rollout.group_size=1: gives no group that is both right and wrong, from which alone NFT learns. "
        "Fix: set rollout.group_size to 2 or more.",
    ),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED, ids=[overrides for overrides, _ in REFUSED])
def test_refused_runs(run_file: Path, overrides: str, message: str) -> None:
    config = load_config(run_file, ["algorithm=nft", *overrides.split()])
    assert [str(each) for each in broken_rules(config)] == [message]


@pytest.mark.parametrize(
    "overrides", ["", "reward.kind=f1 algorithm.rewards=continuous", "reward.kind=mine.rewards:grade"]
)
def test_allowed_runs(run_file: Path, overrides: str) -> None:
    assert list(broken_rules(load_config(run_file, ["algorithm=nft", *overrides.split()]))) == []


@pytest.mark.parametrize(
    "override",
    ["epsilon=0", "epsilon=1e-7", "log_ratio_clamp=51", "log_ratio_clamp=0", "negative_weight=-1", "rate_clamp=0.5"],
)
def test_settings_out_of_their_range(run_file: Path, override: str) -> None:
    with pytest.raises(Refusal, match=rf"algorithm\.{override.partition('=')[0]}"):
        load_config(run_file, ["algorithm=nft", f"algorithm.{override}"])
