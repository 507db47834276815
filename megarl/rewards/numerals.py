"""Numbers as they are written in answers, exactly, and when two of them are equal."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction

#: Significant digits to which a decimal approximation must agree with the number that it stands for. Our choice:
#: math-verify compares six digits after the point, whatever the size of the number.
DIGITS = 6
#: Digits and decimal exponents beyond which a numeral is not read. Our choice.
MOST_DIGITS, LARGEST_EXPONENT = 2000, 2000

_SIGN = r"(?P<sign>[-+]?)\s*"
_PLAIN = r"\d+(?:\.\d*)?|\.\d+"
_POWER = r"10\s*\^\s*(?:\{\s*(?P<exponent>[-+]?\s*\d+)\s*\}|(?P<digit>\d))"
_NUMERAL = re.compile(
    rf"{_SIGN}(?:(?P<mantissa>{_PLAIN})\s*(?:(?:\\times|\\cdot)\s*{_POWER})?|{_POWER.replace('(?P<', '(?P<bare_')})"
)
#: `0.1\\overline{6}`, `0.1(6)`.
_REPEATING = re.compile(
    rf"{_SIGN}(?P<whole>\d*)\.(?P<fixed>\d*)\s*"
    r"(?:\\(?:overline|bar|dot)\s*(?:\{\s*(?P<period>\d+)\s*\}|(?P<digit>\d))|\((?P<bracketed>\d+)\))"
)
_BASE = re.compile(
    r"(?P<digits>[-+]?[0-9A-Fa-f]+)\s*_\s*(?:\{\s*(?:\\text\{)?(?P<long>\d+|[a-z]{3,})\}?\s*\}|(?P<short>\d))"
)
_FRACTION = re.compile(
    rf"{_SIGN}(?:(?P<whole>\d+)\s*(?=\\frac)|(?P<spaced>\d+)\s+(?=\d))?"
    rf"(?:\\frac\s*(?P<upper>\{{\s*[-+]?\s*(?:{_PLAIN})\s*\}}|\s*\d)\s*(?P<lower>\{{\s*[-+]?\s*(?:{_PLAIN})\s*\}}|\d)|"
    rf"(?P<over>{_PLAIN})\s*/\s*(?P<under>{_PLAIN}))"
)


@dataclass(frozen=True, slots=True)
class Numeral:
    """A number as written.

    `form` is integer (digits alone), decimal (digits with a point), measured (a mantissa with a point, times a power of
    ten) or exact (anything else without a point). `base` is the base that it is written in, where it says so: then
    `value` is that of its digits read as decimal. `percent` is whether a percent sign follows; `value` is without it.
    """

    value: Fraction
    form: str
    base: str | None = None
    percent: bool = False


def numeral(text: str) -> Numeral | None:
    """The number that the written `text` is, or None where it is anything else.

    >>> numeral("4.5\\\\times 10^{3}").value
    Fraction(4500, 1)
    """
    text = text.strip()
    if len(text) > MOST_DIGITS:
        return None
    percent = text.endswith("\\%")
    if percent:
        text = text[:-2].rstrip()
    if match := _NUMERAL.fullmatch(text):
        return _power(match, percent)
    if match := _FRACTION.fullmatch(text):
        return _fraction(match, percent)
    if match := _REPEATING.fullmatch(text):
        return _repeating(match, percent)
    match = _BASE.fullmatch(text)
    if match and not percent and match["digits"].lstrip("+-").isdigit():
        return Numeral(Fraction(int(match["digits"])), "integer", match["long"] or match["short"])
    return None


def _power(match: re.Match[str], percent: bool) -> Numeral | None:
    mantissa = match["mantissa"] or "1"
    written = match["exponent"] or match["digit"] or match["bare_exponent"] or match["bare_digit"]
    exponent = int((written or "0").replace(" ", ""))
    if abs(exponent) > LARGEST_EXPONENT:
        return None
    value = Fraction(mantissa.rstrip(".") if mantissa.endswith(".") else mantissa) * Fraction(10) ** exponent
    point = Fraction(mantissa.rstrip(".") or 0).denominator != 1
    form = ("measured" if point else "exact") if written else ("decimal" if point else "integer")
    return Numeral(-value if match["sign"] == "-" else value, form, percent=percent)


def _fraction(match: re.Match[str], percent: bool) -> Numeral | None:
    upper, lower = (
        Fraction(re.sub(r"[{}\s]", "", part).rstrip("."))
        for part in (match["upper"] or match["over"], match["lower"] or match["under"])
    )
    whole = int(match["whole"] or match["spaced"] or 0)
    if lower == 0 or ((match["whole"] or match["spaced"]) and upper / lower < 0):
        return None
    value = whole + upper / lower
    point = upper.denominator != 1 or lower.denominator != 1
    return Numeral(-value if match["sign"] == "-" else value, "measured" if point else "exact", percent=percent)


def _repeating(match: re.Match[str], percent: bool) -> Numeral:
    """Digits whose last ones repeat for ever, exactly."""
    once, period = match["whole"] + match["fixed"], match["period"] or match["digit"] or match["bracketed"]
    value = Fraction(int(once + period) - int(once or 0), 10 ** len(match["fixed"]) * (10 ** len(period) - 1))
    return Numeral(-value if match["sign"] == "-" else value, "exact", percent=percent)


def numerals_equal(reference: Numeral, found: Numeral) -> bool:
    """Whether two numbers are equal.

    Exactly, unless one of them has a point: then to six significant digits, and next to an integer, or where both are
    plain, to six digits after the point as well. A percent sign that only one of them has may be left out or carried
    out; a base that only one of them names is the other's too.
    """
    if reference.base is not None and found.base is not None and reference.base != found.base:
        return False
    if reference.percent != found.percent:
        with_sign, without = (reference, found) if reference.percent else (found, reference)
        carried_out = Numeral(with_sign.value / 100, "decimal" if with_sign.form == "integer" else with_sign.form)
        return _equal(carried_out, without) or _equal(with_sign, without)
    return _equal(reference, found)


def _equal(a: Numeral, b: Numeral) -> bool:
    if a.value == b.value:
        return True
    forms = {a.form, b.form}
    if not forms & {"decimal", "measured"} or not a.value or not b.value:
        return False
    counted = "integer" in forms or forms == {"decimal"} or ("decimal" in forms and 1 in _denominators(a, b))
    return abs(a.value - b.value) <= tolerance(max(abs(a.value), abs(b.value)), counted)


def _denominators(a: Numeral, b: Numeral) -> set[int]:
    return {a.value.denominator, b.value.denominator}


def tolerance(size: Fraction, counted: bool) -> Fraction:
    """Half a unit in the sixth significant digit of a number as large as `size` > 0.

    `counted`: at most half a unit in the sixth digit after the point.
    """
    exponent = _exponent(size)
    return Fraction(10) ** ((min(exponent, -1) if counted else exponent) - DIGITS + 1) / 2


def _exponent(size: Fraction) -> int:
    """The decimal exponent of `size` > 0: 10^e <= size < 10^(e + 1)."""
    guess = math.floor((math.log2(size.numerator) - math.log2(size.denominator)) * math.log10(2))
    if Fraction(10) ** guess > size:
        return guess - 1
    return guess + 1 if Fraction(10) ** (guess + 1) <= size else guess
