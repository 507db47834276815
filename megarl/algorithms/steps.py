"""A response as steps of reasoning, how much later steps look at each, and where it is worth to branch.

AttnRL (arXiv 2509.26628). Pure functions of token texts and numbers; what the policy measures comes in as scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

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


def influence(scores: np.ndarray, distance: int = 4) -> np.ndarray:
    """(S,) how much the steps from `distance` on behind each step look at it, by one layer and head's mean attention
    `scores` (S, S) of query steps (rows) to key steps: the forward context influence before its maximum over layers
    and heads."""
    return np.tril(scores, -distance).sum(axis=0)


def branch_points(
    influences: Sequence[float],
    starts: Sequence[int],
    *,
    count: int = 2,
    quantile: float = 0.8,
    gap: int = 512,
    end: int | None = None,
) -> tuple[tuple[int, ...], int]:
    """The steps before which a response is continued anew, ascending, and how many of them were chosen by score.

    Step k begins at token `starts[k]` of the response, and step 0 is never chosen. Chosen are the earliest steps with
    an influence at or above the response's `quantile`, then the earliest others, each `gap` tokens or more from the
    beginning and from every other one chosen. From step `end` on, where the thinking ends, steps have no score and
    serve to fill. At most `count`, fewer where there are not so many.
    """
    scores = np.asarray(influences, np.float64)
    if len(scores) < 2:
        return (), 0
    last = len(scores) if end is None else min(end, len(scores))
    threshold = float(np.quantile(scores, quantile))
    chosen: list[int] = []

    def take(steps: Sequence[int]) -> None:
        for step in steps:
            far = all(abs(starts[step] - starts[other]) >= gap for other in chosen)
            if len(chosen) < count and step not in chosen and starts[step] >= gap and far:
                chosen.append(step)

    take([step for step in range(1, last) if scores[step] > 0 and scores[step] >= threshold])
    by_score = len(chosen)
    take(range(1, len(scores)))
    return tuple(sorted(chosen)), by_score
