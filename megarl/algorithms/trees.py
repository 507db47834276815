"""Trees of responses: what a segment is worth by its leaves, how many trees grow, how many prompts the next step asks.

AttnRL (arXiv 2509.26628), as the authors' released code has it where that and the paper differ. Pure functions.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

#: The parent of the segments that begin at the prompt.
ROOT = -1


@dataclass(frozen=True)
class Valued:
    """A segment's mean reward over its leaves, their number, and its advantage."""

    value: float
    leaves: int
    advantage: float


def valued(parents: Sequence[int], rewards: Mapping[int, float]) -> tuple[list[Valued], float]:
    """Every segment of a problem's trees, and the value of the root.

    Segments are numbered with parents before children; `parents` has each one's, `ROOT` for those that begin at the
    prompt. `rewards` are those of the leaves, by segment: the segments without children. With V the mean reward of the
    leaves under a segment,

        advantage(s) = [(V(s) - V(root)) + (V(s) - V(parent))] / sqrt(leaves under s)

    Without a branch that is 2 (R - mean R).

    Raises:
        ValueError: a parent that does not come before its child, or rewards of other segments than the leaves.
    """
    inner = {parent for parent in parents if parent != ROOT}
    if any(not ROOT <= parent < number for number, parent in enumerate(parents)):
        raise ValueError(f"parents {list(parents)} must come before their children")
    if set(rewards) != set(range(len(parents))) - inner:
        raise ValueError(f"rewards of {sorted(rewards)} must be those of the segments without children")
    sums, counts = [0.0] * len(parents), [0] * len(parents)
    total, leaves = 0.0, 0
    for number in reversed(range(len(parents))):
        if number in rewards:
            sums[number], counts[number] = float(rewards[number]), 1
            total, leaves = total + sums[number], leaves + 1
        if (parent := parents[number]) != ROOT:
            sums[parent] += sums[number]
            counts[parent] += counts[number]
    root = total / leaves
    values = [one / count for one, count in zip(sums, counts, strict=True)]
    found = []
    for value, count, parent in zip(values, counts, parents, strict=True):
        above = root if parent == ROOT else values[parent]
        found.append(Valued(value, count, ((value - root) + (value - above)) / math.sqrt(count)))
    return found, root


def trees_wanted(right: Sequence[bool]) -> int:
    """How many of a problem's n first samples become trees: ceil(n exp(-z)), of which a share z is right.

    >>> [trees_wanted([True] * count + [False] * (6 - count)) for count in range(7)]
    [6, 6, 5, 4, 4, 3, 3]
    """
    return math.ceil(len(right) * math.exp(-sum(right) / len(right)))


def expanded(right: Sequence[bool], wanted: int, draw: random.Random) -> tuple[int, ...]:
    """Which `wanted` of a problem's first samples become trees, ascending: all of the smaller class, of the wrong ones
    where both are of one size, and some of the other, drawn."""
    classes = [[number for number, one in enumerate(right) if one is kind] for kind in (False, True)]
    few, many = sorted(classes, key=len)
    few = few[:wanted]
    return tuple(sorted([*few, *draw.sample(many, min(wanted - len(few), len(many)))]))


def next_prompts(
    prompts: int, asked: int, wanted: int, with_signal: int, least: int, most: int, rate: float = 0.1
) -> int:
    """Prompts of the next step after one of `prompts`, where `asked` gave `with_signal` sequences to learn from and
    `wanted` were: (1 - rate) of `prompts`, and `rate` of as many as would have given so many; within bounds (ours)."""
    if not with_signal:
        return most if rate else prompts
    return min(max(round((1 - rate) * prompts + rate * wanted / with_signal * asked), least), most)
