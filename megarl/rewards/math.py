"""Grading of mathematical answers. Torch-free; `math_verify` is imported on first use (half a second).

Both rules answer one question, is this response right, as True or False; what that is worth is the
grader's business (`reward.low`, `reward.high`).
"""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from typing import Any

_BOX = "\\boxed"
#: What math-verify can find an answer in: digits, commands, math delimiters. Without any of them there is none.
_GRADABLE = re.compile(r"[\d\\$\[]")
_END_OF_THINKING = "</think>"


def boxed(text: str) -> str | None:
    r"""Content of the last complete `\boxed{...}` in `text`, braces balanced, or None where there is none.

    A box that is opened and never closed (a truncated response) does not count; an earlier complete one does.
    Escaped braces (`\{`) do not count as braces.

    >>> boxed(r"so \boxed{\frac{1}{2}} it is")
    '\\frac{1}{2}'
    """
    start = text.rfind(_BOX)
    while start >= 0:
        content = _balanced(text, start + len(_BOX))
        if content is not None:
            return content
        start = text.rfind(_BOX, 0, start)
    return None


def _balanced(text: str, position: int) -> str | None:
    """Content of the braces that open at `position` (blanks before them allowed), or None."""
    opening = re.compile(r"\s*\{").match(text, position)
    if opening is None:
        return None
    depth, index = 1, opening.end()
    while index < len(text):
        char = text[index]
        if char == "\\":
            index += 2
            continue
        depth += (char == "{") - (char == "}")
        if depth == 0:
            return text[opening.end() : index]
        index += 1
    return None


def boxed_equals(text: str, answer: str) -> bool:
    r"""The strict rule: the last `\boxed{}` of `text` equals `answer` as text, blanks at the ends aside."""
    content = boxed(text)
    return content is not None and content.strip() == answer.strip()


def nothing_to_grade(text: str) -> bool:
    """True where `math_equals` finds no answer in `text` whatever the reference, without importing anything."""
    return _GRADABLE.search(_answer_part(text)) is None


def math_equals(text: str, answer: str) -> bool:
    r"""True where math-verify finds the answer in `text` equivalent to the reference `answer`.

    The last `\boxed{}` is the answer where there is one. Otherwise math-verify looks for one in what
    follows the last `</think>`. It may hang on hostile input beyond the reach of signals: call it in a
    process that can be killed (`megarl.rewards.grader`).
    """
    if boxed_equals(text, answer):
        return True
    if nothing_to_grade(text):
        return False
    math_verify = _math_verify()
    content = boxed(text)
    found = _parse(_answer_part(text) if content is None else f"{_BOX}{{{content}}}")
    # math-verify's own time limits are off: they rely on signals, and the caller's limit is a hard one.
    return bool(math_verify.verify(_parse_reference(answer), found, timeout_seconds=None))


def _answer_part(text: str) -> str:
    """`text` from its last box on where there is one, else what follows the thinking, else all of it."""
    content_start = text.rfind(_BOX)
    if content_start >= 0:
        return text[content_start:]
    return text.rpartition(_END_OF_THINKING)[2]


@lru_cache(maxsize=4096)
def _parse_reference(answer: str) -> Any:
    return _parse(f"{_BOX}{{{answer}}}")


def _parse(text: str) -> Any:
    math_verify = _math_verify()
    return math_verify.parse(
        text,
        [math_verify.LatexExtractionConfig(boxed_match_priority=0), math_verify.ExprExtractionConfig()],
        parsing_timeout=None,
    )


@lru_cache(maxsize=1)
def _math_verify() -> Any:
    import math_verify

    # It warns once that its time limits are off, and logs every answer it cannot read; both are expected here.
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    return math_verify
