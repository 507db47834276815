r"""Whether an answer equals the reference: by its parts, and these by their values.

What is decided here beside math-verify's judgement is listed in docs/rewards.md.
"""

from __future__ import annotations

import re

from megarl.rewards.notation import choice, without_choice, written
from megarl.rewards.numerals import numeral, numerals_equal
from megarl.rewards.reasons import decided
from megarl.rewards.structure import Part, parts_of, split
from megarl.rewards.units import contradict, measured

#: Characters of an answer that are read; a longer one is right only where it is the reference's text. Our choice:
#: references of the usual benchmarks have at most 250.
LONGEST = 1500

#: Numbers in a set that math-verify is asked about; more take seconds. Our choice.
MOST_NUMBERS = 24

_EQUALS = "="
_ORDER = ("<", ">", r"\leq", r"\geq", r"\neq")
_LETTERS = r"(?:[a-zA-Z]|\\[a-zA-Z]+)"
_SUBSCRIPT = r"(?:_(?:\{[^{}]*\}|\w))?'*"
#: What an equation may give the value of: x, f(x), m_{\max}, \angle ABC, |AB|, [ABC], AB, P(A), words.
_NAME = re.compile(
    rf"(?:m\s*)?(?:\\(?:angle|triangle|measuredangle|overline|vec|hat|bar|tilde|overrightarrow|mathbb|text)\s*)?"
    rf"(?:{_LETTERS}{_SUBSCRIPT}(?:\^\s*\{{?(?:-1|\\prime|\*)\}}?)?(?:\s*\(\s*[\w\s,|\\]*\))?|[A-Z]{{1,6}}{_SUBSCRIPT}|"
    rf"\\frac\s*\{{\s*(?:d|\\partial)[^{{}}]*\}}\s*\{{\s*(?:d|\\partial)[^{{}}]*\}}|\\frac\s*\{{[A-Z]+\}}\s*\{{[A-Z]+\}}|"
    rf"\\(?:sin|cos|tan|cot|sec|csc|log|ln|det|operatorname\{{[^{{}}]*\}})\s*(?:\\angle\s*)?\(?{_LETTERS}{_SUBSCRIPT}\)?|"
    rf"\{{[^{{}}]*\}}{_SUBSCRIPT}|\|\s*[A-Z]{{2}}\s*\||\[\s*[A-Z]{{3,6}}\s*\])|"
    rf"(?:\\text\{{[^{{}}]*\}}|[A-Za-z]{{3,}}(?:\s+[A-Za-z]+){{0,4}})(?:\s*\([^()]*\))?"
)
_SET_TALK = (r"\cap", r"\setminus", r"\mathbb", r"\infty", r"\emptyset", *_ORDER)
_WORD = re.compile(r"\\text\{[^{}]*\}|[A-Z]{3,}|[A-Za-z]{4,}")
#: A blank that parts no digits.
_BLANK = re.compile(r"(?<!\d)\s+|\s+(?!\d)")
#: Letters of variables, as in nRT, are no word.
_WRITTEN_AS_WORD = re.compile(r"[A-Z]?[a-z]{2,}|[A-Z]{3,}|[a-zA-Z]{4,}|[Nn][Oo]")
_SPOKEN = re.compile(r"\\text\{([^{}]*)\}")


def answers_equal(reference: str, found: str) -> bool:
    """Whether `found`, the answer as a response gives it, equals the reference.

    May take long on hostile input: call it in a process that can be killed (`megarl.rewards.grader`).
    """
    reference, found = reference.strip(), found.strip()
    if not reference or not found:
        return decided(False, "the reference is empty" if not reference else "the answer is empty")
    if found == reference:
        return decided(True, "the same text")
    if max(len(found), len(reference)) > LONGEST:
        return decided(False, f"longer than {LONGEST} characters, and not the same text")
    expected, given = written(reference), written(found)
    if not expected or not given:
        return decided(False, "nothing is left of {} but layout", reference if not expected else found)
    if _same_text(expected, given):
        return decided(True, "the same text but for layout: {}", given)
    letter = _letter(expected)
    if letter is not None:
        chosen = choice(given)
        return decided(chosen == letter, "the choice is {}, and the reference's {}", chosen or "none", letter)
    return _parts_equal(parts_of(expected), parts_of(without_choice(given)))


def _letter(text: str) -> str | None:
    """The letter of a multiple choice that a reference is, else None."""
    bare = _SPOKEN.sub(r"\1", text).strip(" ().")
    return bare if re.fullmatch("[A-J]", bare) else None


def _same_text(a: str, b: str) -> bool:
    """Whether two texts are the same up to blanks, and words also up to case."""
    spoken = _speaks(a) and _speaks(b)
    a, b = (_BLANK.sub("", _SPOKEN.sub(r"\1", text)) for text in (a, b))
    return a == b or (spoken and a.casefold() == b.casefold())


def _speaks(text: str) -> bool:
    r"""Whether all letters of `text` are those of words: in `\text{}`, or Yes, YES, yes, but neither x nor nRT."""
    words = re.split(r"[\s,.'’-]+", text)
    if "".join(words).isalpha() and any(_WRITTEN_AS_WORD.fullmatch(word) for word in words):
        return True
    rest, spoken = _SPOKEN.subn("", text)
    return spoken > 0 and not any(char.isalpha() for char in rest)


def _parts_equal(a: Part, b: Part) -> bool:
    """Whether the answer `b` has the parts of the reference `a`, in the same kind of brackets.

    A list without brackets may stand for a set, or for a tuple in its order.
    """
    if _same_text(a.text, b.text):
        return decided(True, "{} is the same text but for layout", b.text)
    if a.kind == "value" and b.kind == "value":
        return _values_equal(a.text, b.text)
    if b.kind == "value" and (sides := _sides(b.text)):
        return (not _ordered(b.text) and _all_sides_equal(a, sides)) or _same_set(a, b)
    if a.kind == "value" and (sides := _sides(a.text)) and not _ordered(a.text):
        return _named(sides[0]) and len(sides) == 2 and _parts_equal(parts_of(sides[1]), b)
    kinds = {a.kind, b.kind}
    if kinds <= {"list", "set"}:
        return _same_collection(a.items, b.items)
    if a.kind == b.kind == "union" and _same_collection(a.items, b.items):
        return True
    if kinds == {"list", "union"}:
        # `x<2 or x>3` for (-∞,2) ∪ (3,∞).
        (listed,) = (part for part in (a, b) if part.kind == "list")
        return all(_ordered(item.text) for item in listed.items) and _same_collection(a.items, b.items)
    if a.kind == b.kind or kinds == {"list", "()"}:
        if _same_sequence(a.items, b.items):
            return True
    elif kinds == {"set", "value"}:
        (one,) = (part for part in (a, b) if part.kind == "set")
        return len(one.items) == 1 and _parts_equal(*((one.items[0], b) if one is a else (a, one.items[0])))
    return _same_set(a, b)


def _same_sequence(a: tuple[Part, ...], b: tuple[Part, ...]) -> bool:
    if len(a) != len(b):
        return decided(False, f"{len(b)} part(s) in order where the reference has {len(a)}")
    return all(map(_parts_equal, a, b))


def _same_collection(a: tuple[Part, ...], b: tuple[Part, ...]) -> bool:
    """Whether the parts are the same in some order, each as often."""
    if len(a) != len(b):
        return decided(False, f"{len(b)} part(s) where the reference has {len(a)}")
    left = list(b)
    for part in a:
        match = next((other for other in left if _parts_equal(part, other)), None)
        if match is None:
            return decided(False, "no part is equal to {}", part.text)
        left.remove(match)
    return True


def _same_set(a: Part, b: Part) -> bool:
    """Whether math-verify finds equal sets, where both are of numbers that no list can give."""
    a, b = (parts_of(_without_membership(part.text)) for part in (a, b))
    if not any(part.kind == "union" or _speaks_of_sets(part.text) for part in (a, b)):
        if a.kind == b.kind:
            return False
        return decided(False, f"a {_kind(b)}, {{}}, where the reference is a {_kind(a)}, {{}}", b.text, a.text)
    if not all(part.kind not in ("value", "list") or _speaks_of_sets(part.text) for part in (a, b)):
        return False
    if ("^" in b.text and "^" not in a.text) or max(part.text.count(",") for part in (a, b)) > MOST_NUMBERS:
        return False
    from megarl.rewards.expressions import sets_equal

    return decided(sets_equal(a.text, b.text), "as sets, by math-verify: {} and {}", b.text, a.text)


def _kind(part: Part) -> str:
    """What a part is, in a word."""
    return part.kind if part.kind.isalpha() else f"tuple or interval in {part.kind}"


def _speaks_of_sets(text: str) -> bool:
    return any(word in text for word in _SET_TALK)


def _without_membership(text: str) -> str:
    name, *rest = split(text, r"\in")
    return rest[0] if len(rest) == 1 and _named(name) else text


def _values_equal(a: str, b: str) -> bool:
    """Whether two values are equal: numbers, words, equations, expressions."""
    if _ordered(a) or _ordered(b):
        return _same_set(Part("value", a), Part("value", b))
    expected, given = _sides(a), _sides(b)
    if expected and any(char.isalpha() for char in expected[0]):
        return _equation_given(expected, given, b)
    if expected:
        a = expected[0]
    if given:
        return _all_sides_equal(parts_of(a), given)
    a, b = _not_approximate(a), _not_approximate(b)
    one, other = measured(a), measured(b)
    if contradict(one.unit, other.unit):
        return decided(False, "the units of {} and {} contradict each other", b, a)
    return _plain_equal(one.value, other.value)


def _plain_equal(a: str, b: str) -> bool:
    """Whether two values without unit and relation are equal."""
    if _same_text(a, b):
        return decided(True, "the same value but for its unit: {}", b)
    first, second = numeral(_joined_digits(a)), numeral(_joined_digits(b))
    if first is not None and second is not None:
        return decided(numerals_equal(first, second), "as numbers: {} and {}", b, a)
    if _WORD.fullmatch(a) or _WORD.fullmatch(b):
        return decided(False, "as words: {} and {}", b, a)
    from megarl.rewards.expressions import expressions_equal

    return decided(expressions_equal(_joined_digits(a), _joined_digits(b)), "as expressions: {} and {}", b, a)


def _joined_digits(text: str) -> str:
    """`text` without the commas in `20,000`: a value holds no list."""
    return re.sub(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])", lambda match: match[0].replace(",", ""), text)


def _ordered(text: str) -> bool:
    return any(len(split(text, sign)) > 1 for sign in _ORDER)


def _sides(text: str) -> list[str]:
    r"""The sides of the equation (or `x \in ...`) that `text` is; empty where it is none."""
    sides = split(text, _EQUALS)
    if len(sides) == 1:
        sides = split(text, r"\in")
        sides = sides if len(sides) == 2 and _named(sides[0]) else []
    return sides if all(sides) else []


def _named(text: str) -> bool:
    """Whether `text` is what a value can be given of."""
    part = parts_of(text)
    if part.kind == "()":
        return all(_named(item.text) for item in part.items)
    return _NAME.fullmatch(text) is not None


def _all_sides_equal(a: Part, sides: list[str]) -> bool:
    """Whether every side that is not the value's name equals the reference `a`: `x = 4/2 = 2`, not `x + y = 2`."""
    values = sides[1:] if _named(sides[0]) else sides
    return all(_parts_equal(a, parts_of(side)) for side in values)


def _equation_given(expected: list[str], given: list[str], b: str) -> bool:
    """Whether an answer, with sides `given` where it is an equation, says what the equation `expected` says."""
    named = _named(expected[0])
    if not given:
        return named and _parts_equal(parts_of(expected[1]), parts_of(b))
    if named and _named(given[0]) and _same_text(expected[0], given[0]):
        return _all_sides_equal(parts_of(expected[1]), given)
    if len(expected) != 2 or len(given) != 2:
        return decided(False, "a chain of equations where the reference is another: {}", b)
    from megarl.rewards.expressions import equations_equal

    equal = equations_equal((expected[0], expected[1]), (given[0], given[1]))
    return decided(equal, "as equations: {} and {}", b, "=".join(expected))


def _not_approximate(text: str) -> str:
    r"""The exact side of `2/3 \approx 0.67`; the only value of `x \approx 0.67`."""
    exact, *rounded = split(text, r"\approx")
    return rounded[0] if rounded and _named(exact) else exact
