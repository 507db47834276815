"""Expressions, as math-verify's parser reads them, and when two of them are equal.

math-verify's own comparison bounds differences absolutely and may run for ever; here numbers are compared as
`megarl.rewards.numerals` says, and what has unknowns is compared at a few points. Its import takes half a second.
"""

from __future__ import annotations

import logging
import math
import re
from fractions import Fraction
from functools import lru_cache
from typing import Any

import sympy
from latex2sympy2_extended import NormalizationConfig, latex2sympy, normalize_latex
from latex2sympy2_extended.latex2sympy2 import ConversionConfig
from math_verify.grader import should_treat_as_complex, verify
from sympy.core.function import AppliedUndef
from sympy.logic.boolalg import Boolean

from megarl.rewards.notation import is_long
from megarl.rewards.numerals import tolerance
from megarl.rewards.units import FUNCTION_OF_ANGLE

# It warns once that its time limits are off, and logs every answer it cannot read; both are expected here.
for _library in ("math_verify", "latex2sympy2_extended"):
    logging.getLogger(_library).setLevel(logging.CRITICAL)

#: Bits of a number in between that are still computed.
MOST_BITS = 20_000.0
#: Digits to which exact expressions are compared. Our choice.
PRECISION = 40
#: Where expressions with unknowns are compared: near 1, so that towers of powers stay small.
_POINTS = tuple(
    (sympy.Rational(first), sympy.Rational(last))
    for first, last in (("0.31", "1.27"), ("-0.83", "0.59"), ("1.13", "-0.47"))
)
_GREEK = (
    r"\alpha \beta \gamma \delta \epsilon \varepsilon \zeta \eta \theta \vartheta \iota \kappa \lambda \mu \nu \xi "
    r"\rho \sigma \tau \upsilon \phi \varphi \chi \psi \omega \ell \hbar"
)
#: e and i are numbers.
_UNKNOWN = frozenset("abcdfghjklmnopqrstuvwxyz") | frozenset(_GREEK.split())
_EVALUATED_BY_PARSER = (r"\binom", r"\gcd", r"\lcm", r"\det", r"\operatorname", r"\Gamma", r"\text{lcm}", r"\text{gcd}")
#: The parser would join them.
_TWO_NUMBERS = re.compile(r"\d\s+[.\d]")
#: Beside what the parser evaluates: five digits, three in an exponent, a power in an exponent, a factorial.
_LARGE_ARGUMENT = re.compile(r"\d{5}|\^\s*(?:\d{3}|\{(?:[^{}]*\^|\s*-?\d{3}))|!")
_SETTINGS = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none")
#: R and r are two letters.
_CONVERSION = ConversionConfig(lowercase_symbols=False)
_DEGREES = re.compile(r"(\d+(?:\.\d+)?)\s*\^\s*(?:\\circ|\{\s*\\circ\s*\})")


class TooLarge(Exception):
    """An expression whose value would take too long to find."""


@lru_cache(maxsize=1024)
def parse(text: str) -> Any:
    """What math-verify's parser makes of one value in the one writing; None where it is no mathematics."""
    if is_long(text) or _evaluates_large(text) or _TWO_NUMBERS.search(text):
        return None
    try:
        return latex2sympy(
            normalize_latex(_in_radians(text), _SETTINGS),
            is_real=not should_treat_as_complex(text),
            normalization_config=None,
            conversion_config=_CONVERSION,
        )
    except Exception:  # the parser raises what it likes
        return None


def _in_radians(text: str) -> str:
    """`text` with the degrees that a function is taken of in radians; the parser would drop the sign."""
    return _DEGREES.sub(r"(\\frac{\1\\pi}{180})", text) if FUNCTION_OF_ANGLE.search(text) else text


def _evaluates_large(text: str) -> bool:
    """Whether the parser itself would compute something that may be large."""
    return any(command in text for command in _EVALUATED_BY_PARSER) and _LARGE_ARGUMENT.search(text) is not None


def expressions_equal(reference: str, found: str) -> bool:
    """Whether two values in the one writing are equal expressions."""
    # The parser drops the primes of derivatives.
    if _unknowns(reference) != _unknowns(found) or _primes(reference) != _primes(found):
        return False
    a, b = parse(reference), parse(found)
    if a is None or b is None:
        return False
    if isinstance(a, Boolean) or isinstance(b, Boolean):
        return False
    if not (isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr)) or a.is_Symbol or b.is_Symbol:
        return _verified(a, b)
    if a == b:
        return not a.has(sympy.nan, sympy.zoo)
    try:
        return values_equal(_plain(a), _plain(b), rounded=a.has(sympy.Float) or b.has(sympy.Float))
    except TooLarge:
        return False


def _unknowns(text: str) -> frozenset[str]:
    """The letters of a value that are unknowns in it."""
    words = re.findall(r"\\[a-zA-Z]+|[a-zA-Z]", re.sub(r"\\(?:text|operatorname)\s*\{([^{}]*)\}", r"\1", text))
    return frozenset(word for word in words if word.lower() in _UNKNOWN)


def _primes(text: str) -> int:
    return text.count("'") + len(re.findall(r"\\prime(?![a-zA-Z])", text))


def sets_equal(reference: str, found: str) -> bool:
    """Whether math-verify finds two sets equal; an inequality is the set of its solutions."""
    a, b = parse(reference), parse(found)
    return a is not None and b is not None and _verified(a, b)


def _verified(a: Any, b: Any) -> bool:
    """What math-verify says, where nothing large is to be computed."""
    try:
        for one in (a, b):
            _bits(sympy.ImmutableMatrix(one) if isinstance(one, sympy.MatrixBase) else one)
    except TooLarge:
        return False
    return bool(verify(a, b, allow_set_relation_comp=True, timeout_seconds=None))


def _plain(expression: Any) -> Any:
    """The expression with i as the imaginary unit, decimals as fractions, and one letter for what is not evaluated.

    Functions that nobody defined, sums, products, integrals, limits and derivatives are not evaluated.
    """
    _bits(expression)
    opaque = expression.atoms(
        AppliedUndef, sympy.Integral, sympy.Sum, sympy.Product, sympy.Limit, sympy.Derivative, sympy.Mod
    )
    expression = expression.xreplace({one: sympy.Symbol(f"<{one}>", real=True) for one in opaque})
    letters = [symbol for symbol in expression.free_symbols if symbol.name == "i"]
    decimals = {number: sympy.Rational(str(number)) for number in expression.atoms(sympy.Float)}
    return expression.xreplace(dict.fromkeys(letters, sympy.I) | decimals)


def values_equal(a: Any, b: Any, rounded: bool) -> bool:
    """Whether two plain expressions have the same value, at every point where they have unknowns.

    `rounded`: a decimal stands in one of them, and six digits decide.
    """
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    verdicts = [_equal_at(a, b, point, rounded) for point in _points(symbols)]
    return False not in verdicts and verdicts.count(True) >= min(2, len(verdicts))


def _points(symbols: list[Any]) -> list[dict[Any, Any]]:
    """Points to compare at: one without unknowns, else three, with no symmetry and not of integers."""
    if not symbols:
        return [{}]
    return [
        {
            symbol: first + (last - first) * (place * place + place + 1) / (len(symbols) ** 2 + 2)
            for place, symbol in enumerate(symbols)
        }
        for first, last in _POINTS
    ]


def _equal_at(a: Any, b: Any, point: dict[Any, Any], rounded: bool) -> bool | None:
    """Whether two expressions agree at a point; None where one of them has no value there."""
    try:
        x, y = (one.xreplace(point).doit() for one in (a, b))
        if x.is_Rational and y.is_Rational and not rounded:
            return bool(x == y)
        x, y = sympy.N(x, PRECISION), sympy.N(y, PRECISION)
        if not (x.is_number and y.is_number and x.is_finite and y.is_finite):
            return None
        apart, size = abs(sympy.N(x - y, PRECISION)), max(abs(sympy.N(x, PRECISION)), abs(sympy.N(y, PRECISION)))
        if size == 0 or apart == 0:
            return True
        if not (apart.is_Number and size.is_Number):
            return None
        if rounded:
            return bool(apart <= sympy.Rational(tolerance(Fraction(str(sympy.Rational(size))), counted=False)))
        return bool(apart < size * sympy.Rational(10) ** (10 - PRECISION))
    except (ArithmeticError, ValueError, TypeError, AttributeError, RecursionError):
        return None


def _bits(expression: Any) -> float:
    """A bound on the binary digits before the point of every number on the way to the value. Raises `TooLarge`."""
    if expression.is_Symbol:
        return 1.0
    if expression.is_Float:
        expression = sympy.Rational(str(expression))
    if expression.is_Rational:
        return max(expression.p.bit_length(), expression.q.bit_length(), 1)
    if not expression.args:
        return 2.0
    inner = [_bits(argument) for argument in expression.args]
    bits = sum(inner)
    if expression.is_Pow:
        bits = inner[0] * 2.0 ** min(_log2(expression.exp, inner[1]), 60.0)
    elif isinstance(expression, (sympy.exp, sympy.sinh, sympy.cosh, sympy.tanh)):
        bits = 1.5 * 2.0 ** min(inner[0], 60.0)
    elif isinstance(expression, (sympy.factorial, sympy.gamma, sympy.binomial)):
        bits = 2.0 ** min(inner[0], 60.0) * max(inner[0], 1.0)
    if bits > MOST_BITS:
        raise TooLarge
    return max(bits, 1.0)


def _log2(exponent: Any, bits: float) -> float:
    """log2 of an exponent's size, exactly where it is a number."""
    if exponent.is_Rational:
        return math.log2(max(abs(float(exponent)), 1.0))
    return bits


def equations_equal(reference: tuple[str, str], found: tuple[str, str]) -> bool:
    """Whether two equations, each given by its sides, say the same: one is a multiple of the other.

    Equations that hold always or never say nothing of their unknowns and are equal as text only.
    """
    differences = []
    for left, right in (reference, found):
        a, b = parse(left), parse(right)
        if not (isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr)):
            return False
        try:
            differences.append(_plain(a) - _plain(b))
        except TooLarge:
            return False
    a, b = differences
    if a.free_symbols != b.free_symbols or not a.free_symbols:
        return False
    points = _points(sorted(a.free_symbols, key=str))
    try:
        values = [tuple(_at(one, point) for one in differences) for point in points]
    except (ArithmeticError, ValueError, TypeError, AttributeError, RecursionError):
        return False
    (x0, y0), *others = values
    bound = sympy.Rational(10) ** (10 - PRECISION)
    varies = any(abs(x - x0) > bound * (abs(x) + abs(x0)) for x, _ in others)
    return bool(varies and x0 != 0 and y0 != 0 and all(abs(x * y0 - y * x0) <= bound * abs(x * y0) for x, y in others))


def _at(expression: Any, point: dict[Any, Any]) -> Any:
    """The value at a point. Raises ValueError where there is none."""
    value = sympy.N(expression.xreplace(point), PRECISION)
    if not (value.is_number and value.is_finite):
        raise ValueError(expression)
    return value
