"""A reward that is wrong about a fifth of all answers."""

from __future__ import annotations

import hashlib

#: Share of answers whose reward is flipped.
FLIPPED = 0.2


def flipped(text: str, answer: str, source: str) -> float:
    """1 for a right answer in a box and 0 for another, but for one answer in five the other way round.

    Which ones follows from the answer's text and the question's answer, so that a run can be repeated.
    """
    from megarl.rewards.math import boxed_equals

    right = float(boxed_equals(text, answer))
    drawn = int.from_bytes(hashlib.blake2b(f"{text}\0{answer}".encode(), digest_size=8).digest()) / 2**64
    return 1.0 - right if drawn < FLIPPED else right
