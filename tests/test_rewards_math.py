"""The mathematical rules, without processes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megarl.rewards.math import boxed, boxed_equals, math_equals, nothing_to_grade


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{42}", "42"),
        (r"\boxed {42}", "42"),
        (r"first \boxed{1} then \boxed{2}.", "2"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{}", ""),
        (r"\boxed{7} and \boxed{unfinished", "7"),
        (r"\boxed{unfinished", None),
        (r"\boxed 7", None),
        ("42", None),
    ],
)
def test_boxed_finds_the_last_complete_box(text: str, content: str | None) -> None:
    assert boxed(text) == content


@given(st.text(alphabet="ab1 \\{}", max_size=40))
def test_boxed_content_is_part_of_the_text_and_never_raises(text: str) -> None:
    content = boxed(f"\\boxed{{{text}")
    assert content is None or f"{{{content}}}" in f"{{{text}"


@given(st.text(alphabet="ab1^_+ ", max_size=20), st.text(max_size=30).filter(lambda tail: "\\" not in tail))
def test_a_box_survives_whatever_text_follows_it(content: str, tail: str) -> None:
    assert boxed(f"\\boxed{{{content}}}{tail}") == content


def test_the_strict_rule_compares_text_only() -> None:
    assert boxed_equals(r"\boxed{ 42 }", "42\n")
    assert not boxed_equals(r"\boxed{42.0}", "42")
    assert not boxed_equals(r"\boxed{42} or \boxed{43}", "42")
    assert not boxed_equals("The answer is 42", "42")


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        (r"\boxed{42.0}", "42", True),
        (r"\boxed{\frac{1}{2}}", "0.5", True),
        (r"\boxed{1,000}", "1000", True),
        (r"\boxed{\left( 3, \frac{\pi}{2} \right)}", r"(3, \pi/2)", True),
        (r"\boxed{x^2+2x+1}", "(x+1)^2", True),
        (r"\boxed{43}", "42", False),
        ("The answer is 42.", "42", True),
        ("<think>it might be 42</think>The answer is 41.", "42", False),
        (r"\boxed{42} no wait \boxed{41}", "42", False),
        ("I do not know", "42", False),
        ("", "42", False),
        (r"\boxed{}", "42", False),
        (r"\boxed{\frac{}", "42", False),
    ],
)
def test_math_verify_grades_equivalent_forms(text: str, answer: str, right: bool) -> None:
    assert math_equals(text, answer) is right


@given(st.text(alphabet=st.characters(exclude_characters="0123456789\\$["), max_size=60))
def test_what_is_called_ungradable_has_nothing_math_verify_can_extract(text: str) -> None:
    import math_verify

    if nothing_to_grade(text):
        assert math_verify.parse(text, parsing_timeout=0) == []
