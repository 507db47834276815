"""The calculator: exact values, and what it says of calls that are none."""

from __future__ import annotations

import time
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megarl.environments.arithmetic import NoValue, value_of, written
from megarl.environments.base import Reply
from megarl.environments.calculator import Calculator

VALUES = {
    "12*34": "408",
    " 1 + 2 * 3 ": "7",
    "(1+2)*3": "9",
    "2-3-4": "-5",
    "8/4/2": "1",
    "1/3": "1/3",
    "1/3+1/6": "0.5",
    "0.1+0.2": "0.3",
    "1,234,567*2": "2469134",
    "-2^2": "-4",
    "(-2)^2": "4",
    "2^3^2": "512",
    "2^-2": "0.25",
    "2**10": "1024",
    "7%3": "1",
    "-7%3": "2",
    "--5": "5",
    "3×4÷6": "2",
    "1^99999999999": "1",
    "(-1)^99999999999": "-1",
    "0^0": "1",
    ".5*4": "2",
    "-1/8": "-0.125",
}


@pytest.mark.parametrize("text", VALUES)
def test_values_are_exact(text: str):
    assert Calculator().turn(f"so <tool>{text}</tool>\n") == Reply(
        f"<result>{VALUES[text]}</result>", counters=("calculator_calls",)
    )


#: (what the policy wrote, what it reads).
ERRORS = [
    ("<tool>1/0</tool>", "division by zero"),
    ("<tool>5%(2-2)</tool>", "division by zero"),
    ("<tool>0^-1</tool>", "division by zero"),
    ("<tool></tool>", "nothing to compute"),
    ("<tool>1+</tool>", "a number is missing at the end"),
    ("<tool>(1+2</tool>", "a bracket is not closed"),
    ("<tool>1 2</tool>", "'2' is not expected there"),
    ("<tool>1)</tool>", "')' is not expected there"),
    ("<tool>*3</tool>", "'*' is not expected there"),
    ("<tool>1,23</tool>", "'1,23' is no number"),
    ("<tool>__import__('os')</tool>", "'__import__' is no arithmetic"),
    ("<tool>2^0.5</tool>", "the exponent is no whole number"),
    ("<tool>9^9^9</tool>", "the number becomes too large"),
    ("<tool>9^999999</tool>", "the number becomes too large"),
    ("<tool>" + "*".join(["9" * 90] * 10) + "</tool>", None),
    ("<tool>" + "(" * 60 + "1" + ")" * 60 + "</tool>", "more than 50 brackets or powers stand within each other"),
    ("<tool>" + "^".join(["1"] * 60) + "</tool>", "more than 50 brackets or powers stand within each other"),
    ("<tool>" + "1+" * 50_000 + "1</tool>", "100001 characters are too many, 1000 are allowed"),
    ("<tool>1+<tool>2+3</tool>", "a call within a call"),
    ("<tool>1+1", "the call is not closed with </tool>"),
    ("<tool>" * 20_000, "the call is not closed with </tool>"),
    ("1+1</tool>", "</tool> without <tool>"),
    ("<tool>1</tool>2</tool>", "</tool> without <tool>"),
    ("</tool>" * 20_000, "</tool> without <tool>"),
]


@pytest.mark.parametrize(("said", "why"), ERRORS, ids=range(len(ERRORS)))
def test_what_is_no_call_is_answered_with_the_reason(said: str, why: str | None):
    began = time.process_time()
    reply = Calculator().turn(said)
    assert time.process_time() - began < 0.5
    if why is not None:
        assert reply == Reply(f"<result>error: {why}</result>", counters=("calculator_errors",))


def test_a_turn_without_a_call_at_its_end_is_the_answer():
    assert Calculator().turn("408") == Reply()
    assert Calculator().turn("") == Reply()
    assert Calculator().turn("<tool>1+1</tool> is 2") == Reply(counters=("calculator_call_not_last",))
    # The last of several calls is answered.
    assert Calculator().turn("<tool>1+1</tool> <tool>2+2</tool>").observation == "<result>4</result>"


def joined(parts: tuple[Any, str, Any]) -> tuple[str, Fraction | None]:
    """Two expressions with their values (None: there is none) and a sign between them, in brackets."""
    (left, a), sign, (right, b) = parts
    text = f"({left}{sign}{right})"
    if a is None or b is None or (sign == "/" and b == 0):
        return text, None
    return text, {"+": a + b, "-": a - b, "*": a * b}[sign] if sign != "/" else a / b


NUMBERS = st.integers(0, 99).map(lambda number: (str(number), Fraction(number)))


@given(st.recursive(NUMBERS, lambda x: st.tuples(x, st.sampled_from("+-*/"), x).map(joined), max_leaves=12))
@settings(max_examples=150, deadline=None)
def test_values_are_those_of_fractions(case: tuple[str, Fraction | None]):
    text, expected = case
    if expected is None:
        with pytest.raises(NoValue, match="division by zero"):
            value_of(text)
    else:
        assert value_of(text) == expected
        assert Fraction(written(expected)) == expected


@given(st.text("0123456789+-*/%^()., <tol>/eé\n", max_size=200))
@settings(max_examples=300, deadline=None)
def test_any_text_gets_a_reply(text: str):
    for said in (text, f"<tool>{text}", f"<tool>{text}</tool>"):
        reply = Calculator().turn(said)
        assert reply.observation is None or reply.observation.startswith("<result>")  # type: ignore[union-attr]
