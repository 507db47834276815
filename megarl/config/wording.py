"""Numbers as words of a message."""

from __future__ import annotations

import math
from collections.abc import Sequence


def divisors(*numbers: int) -> str:
    """The common divisors of `numbers`; of those of large numbers the small ones.

    >>> divisors(8, 12)
    '1, 2 or 4'
    """
    common = math.gcd(*numbers)
    return listed([n for n in range(1, min(common, 100_000) + 1) if common % n == 0])


def listed(choices: Sequence[object]) -> str:
    """`choices`, of which there is at least one, as words.

    >>> listed([2]), listed([1, 2, 4])
    ('2', '1, 2 or 4')
    """
    texts = [str(choice) for choice in choices]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} or {texts[-1]}"


def name_ranks(ranks: Sequence[int]) -> str:
    """Ranks in rising order as words.

    >>> name_ranks([3]), name_ranks([0, 1, 2, 5])
    ('rank 3', 'ranks 0-2, 5')
    """
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and spans[-1][1] == rank - 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    text = ", ".join(f"{first}-{last}" if last > first else f"{first}" for first, last in spans)
    return f"rank {text}" if len(ranks) == 1 else f"ranks {text}"
