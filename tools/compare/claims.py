"""Claims as rules on figures: what was claimed, what was seen with each seed, and whether the rule is met."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Figure:
    """One number per seed, with their mean and their spread (sample standard deviation; 0 for a single seed)."""

    per_seed: tuple[float, ...]
    mean: float
    spread: float


@dataclass(frozen=True)
class Claim:
    """A claim and its verdict. `figures` are named as the rule names them."""

    name: str
    source: str
    claim: str
    rule: str
    figures: Mapping[str, Figure]
    holds: bool

    @property
    def seeds(self) -> int:
        """Number of seeds behind the figures."""
        return min(len(figure.per_seed) for figure in self.figures.values())

    def record(self) -> dict[str, Any]:
        """The claim as plain values, for JSON."""
        return asdict(self) | {"seeds": self.seeds}


def figure(values: Sequence[float]) -> Figure:
    """The figure of one value per seed. Raises ValueError where there are none."""
    if not values:
        raise ValueError("a figure needs at least one seed")
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return Figure(tuple(values), statistics.fmean(values), spread)


def noise(first: Figure, second: Figure) -> float:
    """Two standard errors of the difference of two means over seeds."""
    return 2.0 * math.sqrt(sum(f.spread**2 / len(f.per_seed) for f in (first, second)))


def at_least(first: Figure, second: Figure) -> bool:
    """Whether `first` matches or surpasses `second`: its mean is not below by more than the noise."""
    return first.mean >= second.mean - noise(first, second)


def above(first: Figure, second: Figure) -> bool:
    """Whether `first` is above `second` by more than the noise."""
    return first.mean > second.mean + noise(first, second)


def relation(first: Figure, second: Figure) -> str:
    """How two means stand to each other: above, below, or within noise."""
    if above(first, second):
        return "above"
    return "below" if above(second, first) else "within noise"
