"""Scores of benchmarks against closed forms and by simulation."""

from __future__ import annotations

import itertools
import math
import random
from statistics import NormalDist, fmean

import pytest

from megarl.evaluation.estimators import interval, interval_of_average, majority, pass_at, student_quantile


@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_pass_at_k_is_the_share_of_draws_that_hold_a_right_sample(n: int) -> None:
    for c in range(n + 1):
        samples = [True] * c + [False] * (n - c)
        for k in range(1, n + 1):
            draws = list(itertools.combinations(samples, k))
            assert pass_at(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))


@pytest.mark.parametrize("p", [0.0, 0.03, 0.5, 0.9, 1.0])
@pytest.mark.parametrize(("n", "k"), [(4, 1), (4, 4), (16, 8), (32, 4)])
def test_pass_at_k_is_unbiased(p: float, n: int, k: int) -> None:
    mean = sum(math.comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at(n, c, k) for c in range(n + 1))
    assert mean == pytest.approx(1 - (1 - p) ** k, abs=1e-12)
    # The share of groups of k with a right one, taken from the estimated p, is not.
    plugged = sum(
        math.comb(n, c) * p**c * (1 - p) ** (n - c) * (1 - (1 - c / n) ** k) for c in range(n + 1)
    )  # fmt: skip
    assert k == 1 or p in (0.0, 1.0) or plugged < mean - 1e-6


@pytest.mark.parametrize(("n", "c", "k"), [(4, 1, 5), (4, 5, 1), (4, -1, 1), (4, 1, 0)])
def test_pass_at_k_of_what_cannot_be_is_an_error(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match=f"pass@{k} of {n} samples with {c} right"):
        pass_at(n, c, k)


def test_the_majority_counts_votes_and_shares_ties() -> None:
    assert majority([(3, True), (2, False)]) == 1
    assert majority([(2, True), (3, False), (3, False)]) == 0
    assert majority([(2, False), (2, True), (2, False), (1, True)]) == pytest.approx(1 / 3)
    assert majority([]) == 0


def test_with_one_sample_a_problem_the_interval_is_wilsons() -> None:
    for right, n in ((0, 30), (3, 30), (30, 30), (250, 500)):
        p, t = right / n, student_quantile(0.975, n - 1)
        # The variance over problems is taken with n - 1.
        size = n - 1 if 0 < right < n else n
        centre = (p + t * t / (2 * size)) / (1 + t * t / size)
        half = t / (1 + t * t / size) * math.sqrt(p * (1 - p) / size + t * t / (4 * size * size))
        found = interval([1.0] * right + [0.0] * (n - right), 1) or (0.0, 0.0)
        assert found == pytest.approx((centre - half, centre + half), abs=1e-12)
        assert 0 <= found[0] < found[1] <= 1


def test_the_interval_narrows_with_samples_only_as_far_as_problems_differ() -> None:
    alike, apart = [0.5] * 30, [0.0] * 15 + [1.0] * 15
    assert interval([], 4) is None
    wide = interval(apart, 32)
    assert wide == interval(apart, 1)
    narrow = interval(alike, 32)
    assert narrow is not None and wide is not None
    assert narrow[1] - narrow[0] < (wide[1] - wide[0]) / 5
    # No narrower than independent samples allow.
    assert narrow[1] - narrow[0] > 2 * 1.9 * math.sqrt(0.25 / (30 * 32))


@pytest.mark.parametrize(("problems", "samples"), [(30, 1), (30, 4), (40, 32), (500, 1)])
@pytest.mark.parametrize(("a", "b"), [(0.3, 0.9), (1.0, 1.0), (4.0, 1.0)])
def test_intervals_hold_the_true_score_as_often_as_they_say(problems: int, samples: int, a: float, b: float) -> None:
    rng, truth, held, rounds = random.Random(7), a / (a + b), 0, 400
    for _ in range(rounds):
        chances = [rng.betavariate(a, b) for _ in range(problems)]
        means = [fmean(rng.random() < chance for _ in range(samples)) for chance in chances]
        low, high = interval(means, samples) or (0.0, 0.0)
        held += low <= truth <= high
    # 95 % of 400 within three standard deviations.
    assert 0.917 <= held / rounds <= 0.985


def test_students_quantiles() -> None:
    exact = {1: 12.7062, 2: 4.30265, 4: 2.77645, 10: 2.22814, 29: 2.04523, 499: 1.96473}
    for degrees, value in exact.items():
        assert student_quantile(0.975, degrees) == pytest.approx(value, rel=1e-2 if degrees < 10 else 1e-4)
    assert student_quantile(0.975, 10**7) == pytest.approx(NormalDist().inv_cdf(0.975))


def test_the_average_of_two_benchmarks_is_surer_than_either() -> None:
    assert interval_of_average([]) is None
    assert interval_of_average([(0.5, (0.4, 0.65))]) == pytest.approx((0.4, 0.65))
    low, high = interval_of_average([(0.5, (0.4, 0.6)), (0.7, (0.6, 0.8))]) or (0, 0)
    assert (low, high) == pytest.approx((0.6 - 0.1 / math.sqrt(2), 0.6 + 0.1 / math.sqrt(2)))
