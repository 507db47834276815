"""Where in a sequence of token ids a place of its decoded text lies. Torch-free.

Nothing is tokenised again: the same text may have other ids than those that were sampled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megarl.data.tokenizer import Tokenizer

#: Most tokens in a row that can leave a character unfinished: it has up to four bytes, each of which may be a token.
UNFINISHED = 3


def tokens_until(tokenizer: Tokenizer, token_ids: Sequence[int], text: str) -> int:
    """The least number of leading tokens whose decoded text begins with `text`, as that of all of them must.

    Decodes a few prefixes per doubling of the length.
    """

    def reached(count: int) -> bool:
        return tokenizer.decode(token_ids[:count]).startswith(text)

    found = _first(reached, len(token_ids))
    # More tokens do not always mean more text, and a bisection may end behind such a dip: where bytes are tokens,
    # decoders of tokenizer.json take a whole run of them for broken while its last character is unfinished.
    while earlier := [count for count in range(max(found - 1 - UNFINISHED, 0), found - 1) if reached(count)]:
        found = _first(reached, earlier[0])
    return found


def _first(holds: Callable[[int], bool], last: int) -> int:
    """A number in 0..`last` at which `holds` begins to hold, by bisection; it holds at `last`."""
    before = -1
    while last - before > 1:
        middle = (before + last) // 2
        if holds(middle):
            last = middle
        else:
            before = middle
    return last
