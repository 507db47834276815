"""What an answer is counted or measured in: apples, square feet, dollars, degrees."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

#: Units that contradict each other, with their names. A unit that is not here (`apples`) contradicts none.
_NAMES = {
    "metre": "m metre metres meter meters",
    "centimetre": "cm cms centimetre centimetres centimeter centimeters",
    "millimetre": "mm millimetre millimetres millimeter millimeters",
    "kilometre": "km kms kilometre kilometres kilometer kilometers",
    "nanometre": "nm nanometre nanometres nanometer nanometers",
    "inch": "in inch inches",
    "foot": "ft foot feet",
    "yard": "yd yds yard yards",
    "mile": "mi mile miles",
    "second": "s sec secs second seconds",
    "minute": "min mins minute minutes",
    "hour": "h hr hrs hour hours",
    "day": "day days",
    "week": "week weeks",
    "month": "month months",
    "year": "yr yrs year years",
    "gram": "g gram grams",
    "kilogram": "kg kgs kilogram kilograms",
    "milligram": "mg milligram milligrams",
    "pound": "lb lbs pound pounds £ gbp",
    "ounce": "oz ounce ounces",
    "litre": "l L litre litres liter liters",
    "millilitre": "ml mL millilitre millilitres milliliter milliliters",
    "gallon": "gal gallon gallons",
    "acre": "acre acres",
    "mph": "mph",
    "km/h": "kmh kph km/h km/hr",
    "m/s": "m/s",
    "m/s^2": "m/s^2 m/s^{2}",
    "millisecond": "ms millisecond milliseconds",
    "decade": "decade decades",
    "century": "century centuries",
    "ton": "ton tons",
    "pint": "pint pints",
    "quart": "quart quarts",
    "cup": "cup cups",
    "hectare": "ha hectare hectares",
    "kilowatt hour": "kWh",
    "mole": "mol mole moles",
    "megapascal": "MPa",
    "gigapascal": "GPa",
    "arcminute": "arcmin arcminute arcminutes",
    "arcsecond": "arcsec arcsecond arcseconds",
    "radian": "rad radian radians",
    "degree": "deg degree degrees °",
    "dollar": "$ dollar dollars usd",
    "euro": "€ euro euros eur",
    "yen": "¥ yen jpy",
    "rupee": "₹ rs rupee rupees inr",
    "cent": "¢ cent cents",
    "newton": "N newton newtons",
    "kilonewton": "kN",
    "joule": "J joule joules",
    "kilojoule": "kJ kilojoule kilojoules",
    "megajoule": "MJ",
    "electronvolt": "eV",
    "kiloelectronvolt": "keV",
    "megaelectronvolt": "MeV",
    "gigaelectronvolt": "GeV",
    "watt": "W watt watts",
    "kilowatt": "kW kilowatt kilowatts",
    "megawatt": "MW megawatt megawatts",
    "volt": "V volt volts",
    "millivolt": "mV",
    "kilovolt": "kV",
    "ampere": "A amp amps ampere amperes",
    "milliampere": "mA",
    "hertz": "Hz hertz",
    "kilohertz": "kHz",
    "megahertz": "MHz",
    "gigahertz": "GHz",
    "pascal": "Pa pascal pascals",
    "kilopascal": "kPa",
    "kelvin": "K kelvin kelvins",
    "degree Celsius": "Celsius",
    "degree Fahrenheit": "Fahrenheit",
    "a.m.": "a.m a.m. am",
    "p.m.": "p.m p.m. pm",
}
_CANONICAL = {name: canonical for canonical, names in _NAMES.items() for name in names.split()}
#: Further symbols that are units where a blank parts them from a number.
_SYMBOLS = frozenset(
    re.findall(
        r"\w+",
        "C F atm bar T G ohm ohms cc sq pc kpc Mpc",
    )
)
_WORD = r"[a-zA-Z]+(?:[.'-][a-zA-Z]+)*\.?"
_POWER = r"(?:\s*\^\s*(?:\{\s*-?\d\s*\}|-?\d))?"
#: `\text{ cm}^2`, `\text{kcal m}^{-2} \text{yr}^{-1}`.
_SPOKEN = re.compile(rf"((?:\s*(?:/|\\cdot)?\s*\\text\{{[^{{}}]*\}}{_POWER})+)$")
#: ` apples`, ` square feet`, ` km/h`, ` cm^{2}`; at most four words.
_PLAIN = re.compile(rf"(?<=[\d}})%])(\s+{_WORD}{_POWER}(?:\s*[/ ]\s*{_WORD}{_POWER}){{0,3}})$")
#: `5cm`, `60km/h`: known names of two letters and more, without a blank.
_CLOSE = re.compile(r"(?<=[\d}])([a-zA-Z]{2,}(?:/[a-z]+)?)(\^\{?\d\}?)?$")
_DEGREE = re.compile(
    r"\^\s*\\circ\s*(?:(?:\\text\{)?(?P<scale>[CF])\}?)?$|(?<=\d)\s*(?:\^\s*\{?\s*\\prime(?:\s*\\prime)?\s*\}?|'{1,2})$"
)
_DEGREES = {r"^\circ": "degree", "C": "degree Celsius", "F": "degree Fahrenheit"}
_MONEY = re.compile(
    r"^([-+]?)\s*(?:(?:US|C|A|HK)?\s*\\\$|[€£¥₹₩₽₫₺₪฿¢]|Rs\.?\s|(?:\\text\{)?(?:USD|EUR|GBP)\}?)\s*(?=[-+.\d\\{])"
)
_MONEY_BEHIND = re.compile(r"(?<=\d)\s*(\\\$|[€£¥₹₩₽₫₺₪฿¢])$")
_NO_UNIT = re.compile(
    r"\b(?:not|no|or|and|nor|never|wrong|incorrect|false|minus|plus|times|over|maybe|but|is|than|x|y|half|halves|"
    r"thirds|below|above|under|squared|cubed|factorial)\b",
    re.IGNORECASE,
)
#: Degrees behind it are those of its argument, and no unit of the value.
FUNCTION_OF_ANGLE = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-zA-Z])")
_RAISED = re.compile(
    r"(?:(?P<before>square|sq\.?|cubic|cu\.?)\s+)?(?P<name>[a-zA-Z.]+)"
    r"(?:\s*\^\s*\{?\s*(?P<exponent>[23])\s*\}?|\s+(?P<behind>squared|cubed))?"
)
_EXPONENTS = {
    word: exponent
    for exponent, words in (("^2", "square sq squared 2"), ("^3", "cubic cu cubed 3"))
    for word in words.split()
}


class Measured(NamedTuple):
    """The text of a value, and its unit: a known name, "?" for any other, "" for none."""

    value: str
    unit: str


@lru_cache(maxsize=4096)
def measured(text: str) -> Measured:
    r"""The written value `text` and the unit in it.

    >>> measured(r"42 apples"), measured(r"10\text{cm}"), measured(r"\$18")
    (Measured(value='42', unit='?'), Measured(value='10', unit='centimetre'), Measured(value='18', unit='dollar'))
    """
    value, unit = text.strip(), ""
    if match := _MONEY.match(value):
        symbol = match.group()[len(match[1]) :].strip().strip("\\}{").replace("text{", "").lower()
        value, unit = (
            match[1] + value[match.end() :],
            _CANONICAL.get(symbol.rstrip("."), "dollar" if "$" in symbol else "?"),
        )
    if match := _MONEY_BEHIND.search(value):
        value, unit = value[: match.start()], _CANONICAL.get(match[1].lstrip("\\"), "?")
    for pattern in (_SPOKEN, _PLAIN, _CLOSE):
        match = pattern.search(value)
        if match is None or match.start() == 0:
            continue
        name = _named(match.group(), close=pattern is _CLOSE, plain=pattern is _PLAIN)
        if name:
            value, unit = value[: match.start()].strip(), name
            break
    if (match := _DEGREE.search(value)) and not FUNCTION_OF_ANGLE.search(value):
        value, unit = value[: match.start()].strip(), unit or _DEGREES.get(match["scale"] or match.group().strip(), "?")
    return Measured(value, unit)


def _named(text: str, close: bool, plain: bool) -> str:
    """The name of the unit `text`, "?" where it may be one that is not known, "" where it is none."""
    words = " ".join(re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text).replace(r"\cdot", " ").split()).strip(" .")
    match = _RAISED.fullmatch(words)
    name = match["name"] if match else words
    known = _CANONICAL.get(name) or _CANONICAL.get(name.lower() if len(name) > 1 else name)
    if known:
        raised = match and next((match[key] for key in ("before", "behind", "exponent") if match[key]), "")
        return known + (_EXPONENTS[raised.rstrip(".")] if raised else "")
    if close or not words or _NO_UNIT.search(words):
        return ""
    if plain and all(len(word) < 3 for word in re.findall(r"[a-zA-Z]+", words)):
        # `2 n` is a product; `5 Hz` and `4 cm^2` are measured.
        return "?" if all(word in _SYMBOLS or word in _CANONICAL for word in re.findall(r"[a-zA-Z]+", words)) else ""
    return "?"


def contradict(reference: str, found: str) -> bool:
    """Whether two units cannot be the same: both are known and differ."""
    return reference != found and "" not in (reference, found) and "?" not in (reference, found)
