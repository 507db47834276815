"""A response as steps of reasoning, and where it is worth to branch.

AttnRL (arXiv 2509.26628), as the authors' released code has it. Pure functions of token texts and numbers; what the
policy measures comes in as scores.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np

#: What separates steps; the next one where a response has none of the one before.
SEPARATORS = ("\n\n", "\n")


def step_starts(pieces: Sequence[str]) -> tuple[int, ...]:
    r"""Where the steps of a response begin, as numbers of tokens before them; `pieces` are the tokens' texts.

    A step ends after the token in which a separator ends, wherever in it, also where the separator began in an earlier
    token. Without any separator inside the response every token is a step.

    >>> step_starts(["a", "b\n\nc", "d", "\n", "\n", "e"])
    (0, 2, 5)
    """
    for separator in SEPARATORS:
        inside = [end for end in _ends(pieces, separator) if end < len(pieces)]
        if inside:
            return (0, *inside)
    return tuple(range(len(pieces)))


def _ends(pieces: Sequence[str], separator: str) -> list[int]:
    """After how many tokens a separator has just ended."""
    text, ends = "".join(pieces), [*accumulate(map(len, pieces))]
    found: list[int] = []
    place, token = text.find(separator), 0
    while place >= 0:
        end = place + len(separator)
        while ends[token] < end:
            token += 1
        if not found or found[-1] != token + 1:
            found.append(token + 1)
        place = text.find(separator, end)
    return found


def scored(influences: np.ndarray, starts: Sequence[int], length: int, thought: int | None) -> np.ndarray:
    """(S,) the influences of a response's steps as scores: 0 for the first step, and from the one on in which the
    thinking ends, after `thought` of the response's `length` tokens; None: it has no end."""
    scores = np.array(influences, np.float64)
    scores[:1] = 0
    if thought is not None:
        ends = np.array([*starts[1:], length])
        scores[ends >= thought] = 0
    return scores


class BranchPoints(NamedTuple):
    """Where a response is gone on with anew: `places`, tokens before them, ascending, one as often as it was chosen;
    `by_score` of them were chosen by score."""

    places: tuple[int, ...]
    by_score: int


def branch_points(
    scores: Sequence[float] | np.ndarray,
    starts: Sequence[int],
    *,
    count: int = 2,
    quantile: float = 0.8,
    gap: int = 512,
    before: int = 0,
) -> BranchPoints:
    """The places of `count` steps that are made anew.

    Step k begins at token `starts[k]` of the response, which has `before` tokens before it; step 0 is never chosen. By
    score come the earliest steps of a score above 0 and at or above the steps' `quantile` (of the least score above 0,
    where that is 0), which begin `gap` tokens or more after the sequence does, and are as far from the nearer end of
    every step chosen before. Where they are too few the earliest others fill, wherever they stand, and where there are
    too few steps the earliest are chosen again. None where there is one step.
    """
    scores = np.asarray(scores, np.float64)
    if len(scores) < 2:
        return BranchPoints((), 0)
    threshold = float(np.quantile(scores, quantile)) or min(scores[scores > 0], default=0.0)
    chosen: list[int] = []
    for step in range(1, len(scores)):
        if len(chosen) == count:
            break
        near = any(starts[step] - starts[other + 1] < gap for other in chosen)
        if scores[step] > 0 and scores[step] >= threshold and before + starts[step] >= gap and not near:
            chosen.append(step)
    by_score = len(chosen)
    chosen += [step for step in range(1, len(scores)) if step not in chosen][: count - by_score]
    while len(chosen) < count:
        chosen += range(1, min(len(scores), 1 + count - len(chosen)))
    return BranchPoints(tuple(sorted(starts[step] for step in chosen)), by_score)


def highest(values: Iterable[float], count: int) -> tuple[int, ...]:
    """The places of the `count` highest values, ascending; of equal ones the earliest.

    >>> highest([0.5, 2.0, 1.0, 2.0], 2)
    (1, 3)
    """
    ordered = sorted(enumerate(values), key=lambda one: (-one[1], one[0]))
    return tuple(sorted(place for place, _ in ordered[:count]))
