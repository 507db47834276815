"""Exact arithmetic on texts of bounded size: numbers, + - * / % ^ and brackets, by a parser of our own.

Every operation's cost is bounded before it is made, so that no text takes more than milliseconds.
"""

from __future__ import annotations

import re
from fractions import Fraction

#: Characters of an expression, brackets and signs within each other, and bits of a number's parts. Our choices.
LONGEST, DEEPEST, MOST_BITS = 1000, 50, 4096
#: Digits behind the point up to which a quotient is written as a decimal. Our choice.
MOST_DECIMALS = 30

_TOKEN = re.compile(r"\s*(?:(?P<number>[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)|(?P<sign>\*\*|[-+*/%^()×÷·−]))")
_SAME = {"×": "*", "·": "*", "÷": "/", "−": "-", "**": "^"}


class NoValue(Exception):
    """The text has no value; the message says why."""


def value_of(text: str) -> Fraction:
    """The exact value of an expression. Raises `NoValue`.

    >>> value_of("2 * (3 + 4) / 4")
    Fraction(7, 2)
    """
    if len(text) > LONGEST:
        raise NoValue(f"{len(text)} characters are too many, {LONGEST} are allowed")
    parser = _Parser(_tokens(text))
    value = parser.sum(0)
    if parser.ahead is not None:
        raise NoValue(f"'{parser.ahead}' is not expected there")
    return value


def written(value: Fraction) -> str:
    """An integer or a decimal where the value is one, else a fraction.

    >>> written(Fraction(7, 2)), written(Fraction(2, 3)), written(Fraction(-4))
    ('3.5', '2/3', '-4')
    """
    if value.denominator == 1:
        return str(value.numerator)
    rest, twos, fives = value.denominator, 0, 0
    while rest % 2 == 0:
        rest, twos = rest // 2, twos + 1
    while rest % 5 == 0:
        rest, fives = rest // 5, fives + 1
    places = max(twos, fives)
    if rest > 1 or places > MOST_DECIMALS:
        return f"{value.numerator}/{value.denominator}"
    digits = str(abs(value.numerator) * 10**places // value.denominator).rjust(places + 1, "0")
    return f"{'-' if value < 0 else ''}{digits[:-places]}.{digits[-places:]}"


def _tokens(text: str) -> list[str]:
    found, position = [], 0
    text = text.rstrip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            rest = text[position:].lstrip()
            raise NoValue(f"'{rest[:10]}' is no arithmetic")
        found.append(match["number"] or _SAME.get(match["sign"], match["sign"]))
        position = match.end()
    return found


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MOST_BITS:
        raise NoValue("the number becomes too large")
    return value


class _Parser:
    """Recursive descent; `depth` counts what stands within each other."""

    def __init__(self, tokens: list[str]) -> None:
        self._tokens, self._at = tokens, 0

    @property
    def ahead(self) -> str | None:
        return self._tokens[self._at] if self._at < len(self._tokens) else None

    def _take(self) -> str:
        if self.ahead is None:
            raise NoValue("a number is missing at the end" if self._tokens else "nothing to compute")
        self._at += 1
        return self._tokens[self._at - 1]

    def sum(self, depth: int) -> Fraction:
        value = self._product(depth)
        while self.ahead in ("+", "-"):
            sign, right = self._take(), self._product(depth)
            value = _bounded(value + right if sign == "+" else value - right)
        return value

    def _product(self, depth: int) -> Fraction:
        value = self._signed(depth)
        while self.ahead in ("*", "/", "%"):
            sign, right = self._take(), self._signed(depth)
            if sign != "*" and right == 0:
                raise NoValue("division by zero")
            value = _bounded(value * right if sign == "*" else value / right if sign == "/" else value % right)
        return value

    def _signed(self, depth: int) -> Fraction:
        # -2^2 is -4, as in mathematics; 2^-2 is a quarter.
        negative = False
        while self.ahead in ("+", "-"):
            negative ^= self._take() == "-"
        value = self._power(depth)
        return -value if negative else value

    def _power(self, depth: int) -> Fraction:
        if depth > DEEPEST:
            raise NoValue(f"more than {DEEPEST} brackets or powers stand within each other")
        base = self._atom(depth)
        if self.ahead != "^":
            return base
        self._take()
        negative = False
        while self.ahead in ("+", "-"):
            negative ^= self._take() == "-"
        exponent = self._power(depth + 1)
        if exponent.denominator != 1:
            raise NoValue("the exponent is no whole number")
        power = -exponent.numerator if negative else exponent.numerator
        if base == 0 and power < 0:
            raise NoValue("division by zero")
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        # Of 0, 1 and -1 every power is small.
        if abs(base) not in (0, 1) and bits * abs(power) > MOST_BITS:
            raise NoValue("the number becomes too large")
        return base ** (power if abs(base) not in (0, 1) else _small(power))

    def _atom(self, depth: int) -> Fraction:
        token = self._take()
        if token == "(":
            value = self.sum(depth + 1)
            if self.ahead != ")":
                raise NoValue("a bracket is not closed")
            self._take()
            return value
        if token[0] not in "0123456789.":
            raise NoValue(f"'{token}' is not expected there")
        if "," in token and re.fullmatch(r"[0-9]{1,3}(,[0-9]{3})+(\.[0-9]+)?", token) is None:
            raise NoValue(f"'{token[:20]}' is no number")
        return _bounded(Fraction(token.replace(",", "")))


def _small(power: int) -> int:
    """An exponent that gives the same power of 0, 1 and -1."""
    return 0 if power == 0 else 2 - power % 2
