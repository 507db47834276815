"""The reward of the campaign's runs, graded in processes of its own."""

from __future__ import annotations

import time


def digit_share(text: str, answer: str, source: str) -> float:
    """A reward that a random model earns unevenly: the share of digits in its answer."""
    # Long enough for a fault to come in the middle.
    time.sleep(0.01)
    return sum(character.isdigit() for character in text) / max(1, len(text))
