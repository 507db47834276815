"""Numbers as words of a refusal's fix."""

from __future__ import annotations

from collections.abc import Sequence


def divisors(*numbers: int) -> str:
    """The common divisors of `numbers`.

    >>> divisors(8, 12)
    '1, 2 or 4'
    """
    return listed([n for n in range(1, min(numbers) + 1) if all(number % n == 0 for number in numbers)])


def listed(numbers: Sequence[int]) -> str:
    """`numbers`, of which there is at least one, as a choice.

    >>> listed([2]), listed([1, 2, 4])
    ('2', '1, 2 or 4')
    """
    texts = [str(number) for number in numbers]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} or {texts[-1]}"
