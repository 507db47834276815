"""Advantages from rewards, in float64: of one group, and of all samples of a step together.

A group is the G samples of one prompt, R_i their rewards. Where all advantages must be 0 they are so by comparison and
not by arithmetic: seven times 0.7 has a rounded mean beside 0.7, and divided by a standard deviation of the same size
the digit would become a real advantage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache

from megarl.config.algorithms import GroupRelativeSettings


def group_advantages(
    settings: GroupRelativeSettings, rewards: tuple[float, ...], lengths: Sequence[int]
) -> tuple[float, ...]:
    """One advantage per sample by `settings.advantage`; see the functions of `ESTIMATORS`.

    Exactly 0 for all where all rewards are equal, but for reinforce_pp, whose baseline is the step's.
    """
    if settings.advantage == "reinforce_pp":
        return rewards
    if len(rewards) == 1:
        return rewards if settings.singleton_advantage == "reward" else (0.0,)
    if min(rewards) == max(rewards):
        return (0.0,) * len(rewards)
    return ESTIMATORS[settings.advantage](settings, rewards, lengths)


def batch_normalized(
    settings: GroupRelativeSettings, advantages: Sequence[float], tokens: Sequence[int]
) -> tuple[float, ...]:
    """(A - mean) / (std + epsilon) over all samples of a step, each counted once per trained token.

    REINFORCE++ (2501.03262), whose advantages are those of tokens. Exactly 0 for all where all are equal.
    """
    if not advantages or min(advantages) == max(advantages):
        return (0.0,) * len(advantages)
    total = sum(tokens)
    shares = [count / total for count in tokens]
    mean = math.fsum(share * advantage for share, advantage in zip(shares, advantages, strict=True))
    deviations = [advantage - mean for advantage in advantages]
    return _over_std(settings, deviations, _std(settings, deviations, shares, total))


def _grpo(settings: GroupRelativeSettings, rewards: Sequence[float], lengths: Sequence[int]) -> tuple[float, ...]:
    """R_i - mean R, over the standard deviation (GRPO, 2402.03300 section 4.1.2) or not (Dr. GRPO, 2503.20783)."""
    deviations = _from_mean(rewards)
    return _over_std(settings, deviations, _std_of_rewards(settings, rewards))


def _rloo(settings: GroupRelativeSettings, rewards: Sequence[float], lengths: Sequence[int]) -> tuple[float, ...]:
    """R_i less the mean of the others' rewards (2402.14740): G / (G - 1) of the distance from the mean."""
    size = len(rewards)
    return tuple(size / (size - 1) * deviation for deviation in _from_mean(rewards))


def _opo(settings: GroupRelativeSettings, rewards: Sequence[float], lengths: Sequence[int]) -> tuple[float, ...]:
    """R_i less the mean reward weighted by length, the baseline of least variance where the gradients of tokens are
    independent and of one size (2505.23585). A response's length is that of all of it, trained or not."""
    total = sum(lengths)
    if total == 0:
        return tuple(_from_mean(rewards))
    products = (reward * length for reward, length in zip(rewards, lengths, strict=True))
    baseline = math.fsum(products) / total
    return tuple(reward - baseline for reward in rewards)


def _reinforce_pp_baseline(
    settings: GroupRelativeSettings, rewards: Sequence[float], lengths: Sequence[int]
) -> tuple[float, ...]:
    """R_i - mean R (2501.03262), before `batch_normalized`."""
    return tuple(_from_mean(rewards))


def _pass_at_k(settings: GroupRelativeSettings, rewards: Sequence[float], lengths: Sequence[int]) -> tuple[float, ...]:
    """The reward of a set of k samples is its greatest reward. A sample's advantage is the mean reward of the sets that
    hold it, less that of all sets, over the standard deviation of the sets' rewards, all C(G, k) of them counted
    (2508.10751, there for rewards of two values). k = 1 is GRPO."""
    ordered, size = sorted(rewards), _pass_k(settings)
    shares = _shares(len(ordered), size)
    maxima = [(reward, share) for reward, share in zip(ordered, shares, strict=True) if share > 0]
    if maxima[0][0] == maxima[-1][0]:
        return (0.0,) * len(rewards)
    mean = math.fsum(share * reward for reward, share in maxima)
    spread = _std(
        settings, [reward - mean for reward, _ in maxima], [share for _, share in maxima], math.comb(len(rewards), size)
    )
    gains = {reward: _mean_greatest_with(reward, ordered, size) - mean for reward in set(rewards)}
    return _over_std(settings, [gains[reward] for reward in rewards], spread)


def _pass_at_k_loo(
    settings: GroupRelativeSettings, rewards: Sequence[float], lengths: Sequence[int]
) -> tuple[float, ...]:
    """What a sample adds to the greatest reward of k - 1 others, in the mean over all choices of these.

    The leave-one-out estimator of 2505.15201, whose s_i is k / G times this. With k = G it is the distance from
    the best to the second best reward for the best sample, and 0 for the others (2503.19595).
    """
    ordered = sorted(rewards)
    shares = _shares(len(ordered) - 1, _pass_k(settings) - 1)
    gains: dict[float, float] = {}
    for reward in set(rewards):
        # It adds something where the greatest of the others is below it.
        below = ordered[: ordered.index(reward)]
        gains[reward] = math.fsum(share * (reward - value) for share, value in zip(shares, below, strict=False))
    return _over_std(settings, [gains[reward] for reward in rewards], _std_of_rewards(settings, rewards))


#: By `GroupRelativeSettings.advantage`: from a group of at least two samples with unlike rewards to advantages.
ESTIMATORS: dict[str, Callable[[GroupRelativeSettings, Sequence[float], Sequence[int]], tuple[float, ...]]] = {
    "grpo": _grpo,
    "rloo": _rloo,
    "opo": _opo,
    "reinforce_pp_baseline": _reinforce_pp_baseline,
    "pass_at_k": _pass_at_k,
    "pass_at_k_loo": _pass_at_k_loo,
}


def _from_mean(rewards: Sequence[float]) -> list[float]:
    mean = math.fsum(rewards) / len(rewards)
    return [reward - mean for reward in rewards]


def _std_of_rewards(settings: GroupRelativeSettings, rewards: Sequence[float]) -> float:
    return _std(settings, _from_mean(rewards), [1 / len(rewards)] * len(rewards), len(rewards))


def _std(settings: GroupRelativeSettings, deviations: Sequence[float], shares: Sequence[float], count: int) -> float:
    """The standard deviation, given deviations from the mean, the share of each in the `count` values, and the
    settings' estimator."""
    # Scaled by the largest deviation, because the squares of very small ones underflow to 0.
    largest = max(abs(deviation) for deviation in deviations)
    squares = math.fsum(share * (deviation / largest) ** 2 for deviation, share in zip(deviations, shares, strict=True))
    if settings.std_estimator == "sample":
        squares /= 1 - 1 / count
    return largest * math.sqrt(squares)


def _over_std(settings: GroupRelativeSettings, advantages: Sequence[float], std: float) -> tuple[float, ...]:
    if not settings.divides_by_std:
        return tuple(advantages)
    return tuple(advantage / (std + settings.std_epsilon) for advantage in advantages)


def _pass_k(settings: GroupRelativeSettings) -> int:
    if settings.pass_k is None:
        raise ValueError(f"algorithm.pass_k is None, but algorithm.advantage={settings.advantage} needs it")
    return settings.pass_k


@cache
def _shares(count: int, size: int) -> tuple[float, ...]:
    """Of the sets of `size` out of `count` ordered values, the share whose greatest is the 1st, 2nd, ... value."""
    # Whole numbers are divided, which rounds once, however large they are.
    return tuple(math.comb(below, size - 1) / math.comb(count, size) for below in range(count))


def _mean_greatest_with(value: float, ordered: Sequence[float], size: int) -> float:
    """The greatest of a set of `size` of the values that holds `value`, in the mean over all such sets."""
    if size == 1:
        return value
    place, shares = ordered.index(value), _shares(len(ordered) - 1, size - 1)
    others = [*ordered[:place], *ordered[place + 1 :]]
    return math.fsum(share * max(other, value) for share, other in zip(shares, others, strict=True))
