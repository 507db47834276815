r"""The parts of an answer: lists, sets, tuples, intervals, unions, and the values in them.

Brackets and separators are read here, so that a set stays a set and a point a point; what stands in them is read by
math-verify's parser.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

Kind = Literal["value", "list", "set", "union", "()", "[]", "(]", "[)", "matrix", "row"]

#: Parts that an answer may have, and brackets that it may nest. More is read as one value. Our choice.
MOST_PARTS, DEEPEST = 64, 10

_OPENING = {"(": "()", "[": "[]", r"\{": "set", "{": "{}"}
_TOKEN = re.compile(r"\\begin\{\w+\*?\}|\\end\{\w+\*?\}|\\[a-zA-Z]+|\\.|[\s\S]")
_MATRIX = re.compile(r"\\begin\{pmatrix\}((?:(?!\\begin|\\end)[\s\S])*)\\end\{pmatrix\}")
_THOUSANDS = re.compile(r"[-+]?(?:(?:\\\$|[€£¥₹₩])\s*)?\d{1,3}(?:,\d{3})+(?:\.\d+)?(?!\d)")


@dataclass(frozen=True, slots=True)
class Part:
    """A value, or brackets (`kind`) with the parts in them. `text` is how it was written."""

    kind: Kind
    text: str
    items: tuple[Part, ...] = ()


@lru_cache(maxsize=4096)
def parts_of(text: str, depth: int = 0) -> Part:
    r"""The written answer `text` as a tree of parts.

    >>> parts_of(r"(1,2),(3,4)").kind, parts_of(r"\{1, 2\}").kind, parts_of("x+1").kind
    ('list', 'set', 'value')
    """
    text = text.strip()
    if depth > DEEPEST:
        return Part("value", text)
    if text == r"\emptyset":
        return Part("set", text)
    if matrix := _MATRIX.fullmatch(text):
        return _matrix(text, matrix[1], depth)
    if match := _THOUSANDS.match(text):
        # 1,000 alone is a number; so it is with a unit. 1,000,2 is neither.
        rest = text[match.end() :]
        if "," not in rest:
            return Part("value", match.group().replace(",", "") + rest)
    for separator in (";", ","):
        pieces = split(text, separator)
        if 1 < len(pieces) <= MOST_PARTS:
            if not all(pieces):
                return Part("value", text)
            return Part("list", text, tuple(parts_of(piece, depth + 1) for piece in pieces))
    pieces = split(text, r"\cup")
    if 1 < len(pieces) <= MOST_PARTS and all(pieces):
        return Part("union", text, tuple(parts_of(piece, depth + 1) for piece in pieces))
    if r"\pm" in text or r"\mp" in text:
        return _both_signs(text, depth)
    return _enclosed(text, depth)


def _matrix(text: str, inner: str, depth: int) -> Part:
    """Rows of cells; empty lines at the end do not count."""
    rows = [row for row in split(inner.replace(r"\hline", ""), "\\\\") if row]
    cells = [tuple(parts_of(cell, depth + 1) for cell in split(row, "&")) for row in rows]
    return Part("matrix", text, tuple(Part("row", row, items) for row, items in zip(rows, cells, strict=True)))


def _both_signs(text: str, depth: int) -> Part:
    upper = re.sub(r"\\pm(?![a-zA-Z])\s*", "+", re.sub(r"\\mp(?![a-zA-Z])\s*", "-", text))
    lower = re.sub(r"\\pm(?![a-zA-Z])\s*", "-", re.sub(r"\\mp(?![a-zA-Z])\s*", "+", text))
    return Part(
        "list", text, tuple(parts_of(re.sub(r"(^|[=(,{])\+", r"\1", sign), depth + 1) for sign in (upper, lower))
    )


def _enclosed(text: str, depth: int) -> Part:
    """The part that brackets around all of `text` make, else a value."""
    brackets = _around(text)
    if brackets is None:
        return Part("value", text)
    opening, closing = brackets
    inner = text[len(opening) : len(text) - len(closing)]
    if opening == "{" and closing == "}":
        return parts_of(inner, depth + 1)
    if opening == r"\{" and closing == r"\}":
        if re.search(r"\||:|\\mid|\\colon", inner):
            return Part("value", text)
        pieces = [piece for piece in _separated(inner) if piece]
        return Part("set", text, tuple(parts_of(piece, depth + 1) for piece in pieces))
    pieces = _separated(inner)
    if len(pieces) > 1 and all(pieces) and len(pieces) <= MOST_PARTS and {opening, closing} <= set("()[]"):
        kind: Kind = f"{opening}{closing}"  # type: ignore[assignment]
        return Part(kind, text, tuple(parts_of(piece, depth + 1) for piece in pieces))
    if opening == "(" and closing == ")" and len(pieces) == 1:
        return parts_of(inner, depth + 1)
    return Part("value", text)


def _separated(inner: str) -> list[str]:
    """What separators part in brackets; a comma with three digits behind it parts too, unless others have blanks."""
    for separator in (";", ","):
        pieces = split(inner, separator)
        if len(pieces) > 1:
            break
    if separator == "," and re.search(r",\s", inner) and re.search(r"\d,\d{3}(?!\d)", inner):
        return split(re.sub(r"(?<![\d.,])(\d{1,3})((?:,\d{3})+)(?!\d)", lambda m: m[0].replace(",", ""), inner), ",")
    return pieces


def split(text: str, separator: str) -> list[str]:
    """The pieces of `text` between the separators that stand in no bracket."""
    pieces, depth, start = [], 0, 0
    for token in _TOKEN.finditer(text):
        word = token.group()
        if word in ("(", "[", "{", r"\{", r"\lfloor", r"\lceil") or word.startswith(r"\begin"):
            depth += 1
        elif word in (")", "]", "}", r"\}", r"\rfloor", r"\rceil") or word.startswith(r"\end{"):
            depth -= 1
        elif word == separator and depth == 0:
            pieces.append(text[start : token.start()].strip())
            start = token.end()
    pieces.append(text[start:].strip())
    return pieces


def _around(text: str) -> tuple[str, str] | None:
    """The brackets that enclose all of `text`, else None."""
    opened: list[str] = []
    tokens = [token.group() for token in _TOKEN.finditer(text)]
    if len(tokens) < 2 or tokens[0] not in _OPENING:
        return None
    for index, word in enumerate(tokens):
        if word in _OPENING:
            opened.append(word)
        elif word in (")", "]", "}", r"\}") and opened:
            opening = opened.pop()
            if not opened:
                whole = index == len(tokens) - 1 and (opening in "([") == (word in ")]")
                return (opening, word) if whole else None
    return None
