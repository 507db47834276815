"""Where the answer stands in a response."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megarl.rewards.extraction import boxed, taken


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{42}", "42"),
        (r"\boxed {42}", "42"),
        (r"\fbox{42}", "42"),
        (r"\\boxed{42}", "42"),
        (r"first \boxed{1} then \boxed{2}.", "2"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{a \boxed{b} c}", "b"),
        (r"\boxed{}", ""),
        (r"\boxed{7} and \boxed{unfinished", "7"),
        (r"} \boxed{7} {", "7"),
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


@pytest.mark.parametrize(
    "piece", [r"\boxed{", r"\boxed{1}", "{", r"\\", "$", "answer is ", "</think>", "1,", r"\(", " "]
)
def test_the_time_is_linear_in_the_length(piece: str) -> None:
    def seconds(length: int) -> float:
        text = piece * (length // len(piece))
        start = time.process_time()
        taken(text)
        return time.process_time() - start

    seconds(1000)
    # 2,000 boxes took seconds where every one was looked at to the end; a quadratic search of a million takes minutes.
    assert seconds(1_000_000) < 5


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is 42.", "42."),
        ("**Answer:** 42", "42"),
        ("#### 1,234", "1,234"),
        ("The answer is:\n\n42", "42"),
        ("Thus, the final answer is\n\\[\\frac{1}{2}\\]", r"\frac{1}{2}"),
        ("The answer is 42, not 41.", "42"),
        ("The answer is 42 because 6 * 7 = 42.", "42"),
        ("The correct option is (C).", "(C)."),
        ("The answer is $x=3$ since $3+4=7$.", "x=3"),
        ("The answer is $1$ or $2$.", "1, 2"),
        ("So 6 * 7 = 42 eggs.", "42"),
        ("so 6*7 = 42", "6*7 = 42"),
        ("It is $\\frac{1}{2}$, as $x$ is 4, so $y = 2$.", "y = 2"),
        ("We get 41. Then there are 42 apples.", "42"),
        ("It is 42 or 41", "42 or 41"),
        ("(1, 2)", "(1, 2)"),
        (r"The answer is $\text{neither}$.", r"\text{neither}"),
        ("It is not 42.", None),
        ("The answer isn't 42.", None),
        ("It cannot be 42.", None),
        ("Perhaps 42.", None),
        ("Is it 42?", None),
        ("The answer is either 41 or 42.", None),
        ("42 is not the answer.", None),
        ("I do not know", None),
        (r"<think>\boxed{42}</think> I am not sure.", None),
        (r"<think>\boxed{42}</think>", "42"),
        (r"<think>\boxed{42}</think> As said above.", "42"),
        (r"<think>\boxed{42}</think> It is not 42.", None),
        ("<think>The answer is 42.</think>", None),
        (r"[THINK]\boxed{42}[/THINK]It is 41.", "41."),
        (r"\boxed{42}</think>The answer is \boxed{41}", "41"),
        (r"\boxed{41}, \boxed{42}", "41, 42"),
        (r"$\boxed{41}$ and $\boxed{42}$", "41, 42"),
        (r"\boxed{41} no wait \boxed{42}", "42"),
    ],
)
def test_without_a_box_the_last_statement_counts(text: str, answer: str | None) -> None:
    found = taken(text).answer
    assert (None if found is None else found.strip()) == answer
