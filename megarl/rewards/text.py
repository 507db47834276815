"""Rewards that need nothing but the text. Torch-free."""

from __future__ import annotations

import string
import unicodedata
from collections import Counter

_ARTICLES = frozenset(("a", "an", "the"))
_ASCII_PUNCTUATION = frozenset(string.punctuation)


def token_f1(text: str, reference: str) -> float:
    """F1 of the words that `text` and `reference` share, in [0, 1], each word as often as it stands in both.

    The measure of SQuAD (arXiv 1606.05250, section 6.1): words are what blanks separate in lower case, without
    punctuation and the articles a, an, the. Where either has no word left, 1 if both have none, else 0 (as SQuAD 2.0's
    evaluation). Punctuation beyond ASCII, such as curly quotes, goes too: our choice.

    >>> token_f1("The cat sat.", "a cat sat down")
    0.8
    """
    words, expected = _words(text), _words(reference)
    if not words or not expected:
        return float(words == expected)
    shared = sum((Counter(words) & Counter(expected)).values())
    # 2PR / (P + R) with P = shared / words and R = shared / expected.
    return 2 * shared / (len(words) + len(expected))


def _words(text: str) -> list[str]:
    kept = "".join(char for char in text.lower() if not _is_punctuation(char))
    return [word for word in kept.split() if word not in _ARTICLES]


def _is_punctuation(char: str) -> bool:
    return char in _ASCII_PUNCTUATION or unicodedata.category(char).startswith("P")
