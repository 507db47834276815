"""Scores of a benchmark from graded samples: avg@k, pass@k, maj@k, and an interval over its problems. Torch-free.

A problem has n samples, c of them right. Problems are what a benchmark draws from its field, so they are the unit of
the interval; samples of one problem are not independent of each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, variance

#: Share of intervals that hold the true value, were the benchmark drawn again and again.
LEVEL = 0.95


def pass_at(n: int, c: int, k: int) -> float:
    """The chance that k samples drawn without repetition from n, c of them right, hold a right one.

    It is 1 - C(n-c, k) / C(n, k), the unbiased estimate of pass@k (Chen et al., arXiv 2107.03374, eq. 1).

    Raises ValueError unless 1 <= k <= n and 0 <= c <= n.

    >>> pass_at(4, 1, 2)
    0.5
    """
    if not (1 <= k <= n and 0 <= c <= n):
        raise ValueError(f"pass@{k} of {n} samples with {c} right")
    if n - c < k:
        return 1.0
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def majority(groups: Sequence[tuple[int, bool]]) -> float:
    """Whether the answer that most samples give is right: 1 or 0, and with several as frequent the share of right ones
    among these, what drawing one of them gives in the mean.

    `groups` are the distinct answers of a problem, each with the number of samples that give it and whether it is
    right. Samples without an answer vote for none; 0 where all are such.

    >>> majority([(2, True), (2, False), (1, False)])
    0.5
    """
    most = max((votes for votes, _ in groups), default=0)
    if most == 0:
        return 0.0
    return fmean(right for votes, right in groups if votes == most)


def interval(means: Sequence[float], samples: int, level: float = LEVEL) -> tuple[float, float] | None:
    """A confidence interval of a benchmark's score, from its problems' mean scores in [0, 1]; None without problems.

    It is Wilson's interval (1927) with the effective number of problems p(1-p)/s² in the place of a sample's size, s²
    the variance of the mean over problems, and Student's quantile in the place of the normal one, as survey statistics
    takes it for clustered samples (Dean and Pagano, J. Surv. Stat. Methodol. 3, 2015). With one sample a problem it
    is Wilson's own. A plain t-interval leaves [0, 1], and is of width 0 where a small benchmark is all right or all
    wrong. `samples`: how many each problem has; the effective number is at most all of them.
    """
    n = len(means)
    if n == 0:
        return None
    p = fmean(means)
    effective = float(n)
    if n > 1 and 0 < p < 1:
        spread = variance(means, p) / n
        most = float(n * samples)
        effective = most if spread <= 0 else min(p * (1 - p) / spread, most)
    t = student_quantile(0.5 + level / 2, n - 1) if n > 1 else NormalDist().inv_cdf(0.5 + level / 2)
    return _wilson(p, effective, t)


def _wilson(p: float, n: float, z: float) -> tuple[float, float]:
    weight = z * z / n
    centre = (p + weight / 2) / (1 + weight)
    half = z / (1 + weight) * math.sqrt(p * (1 - p) / n + weight / (4 * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def student_quantile(share: float, degrees: int) -> float:
    """Where Student's distribution has `share` below it: exact for 1 and 2 degrees of freedom, else Fisher and
    Cornish's expansion, within 1 % from 3 on and 0.01 % from 10 on at shares up to 0.975."""
    if degrees == 1:
        return math.tan(math.pi * (share - 0.5))
    if degrees == 2:
        return (2 * share - 1) / math.sqrt(2 * share * (1 - share))
    z, v = NormalDist().inv_cdf(share), float(degrees)
    terms = (
        (z**3 + z) / (4 * v),
        (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2),
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3),
    )
    return z + sum(terms)


def interval_of_average(parts: Sequence[tuple[float, tuple[float, float]]]) -> tuple[float, float] | None:
    """The interval of the plain mean of benchmarks' scores, each given with its own interval; None without any.

    Benchmarks are independent, so distances from score to each end add up in squares (Zou and Donner, Stat. Med. 27,
    2008).
    """
    if not parts:
        return None
    mean = fmean(score for score, _ in parts)
    below, above = (math.sqrt(sum((score - ends[side]) ** 2 for score, ends in parts)) / len(parts) for side in (0, 1))
    return max(0.0, mean - below), min(1.0, mean + above)
