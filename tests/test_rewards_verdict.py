"""Which replies of a judge hold one clear score, and what the judge is asked."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megarl.rewards.answers import GradingItem
from megarl.rewards.verdict import REMINDER, TEMPLATE, message_of, read_score


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("Score: 8", 8.0),
        ("The answer is right but long.\nScore: 8", 8.0),
        ("Right. Score: 8", 8.0),
        ("score:8", 8.0),
        ("SCORE = 8", 8.0),
        ("Score：8", 8.0),
        ("Score: 10", 10.0),
        ("Score: 8.5", 8.5),
        ("Score: 8.", 8.0),
        ("**Score: 8**", 8.0),
        ("**Score:** 8", 8.0),
        ("**Score**: 8", 8.0),
        ("__Score__: `8`", 8.0),
        ("Score: [[8]]", 8.0),
        ('{"why": "right", "score": 8}', 8.0),
        ('{"score": "8"}', 8.0),
        ("final_score: 8", 8.0),
        ("Final score (1-10): 8", 8.0),
        ("Score: 8/10", 8.0),
        ("Score: **8** / 10", 8.0),
        ("Score: 8 out of 10.", 8.0),
        ("8/10", 8.0),
        ("It is right.\n**8/10**\n", 8.0),
        ("8/10\r\n", 8.0),
        ("8.5 out of 10", 8.5),
        ("## Score:\n\n8", 8.0),
        ("Score:\n**8**/10", 8.0),
        ("Score: 8 because it is right", 8.0),
        ("Score: 8 – good", 8.0),
        ("Score: 8. Score: 8", 8.0),
        ("Score: 8\nScore: 8.0\n8/10", 8.0),
        ("2 of 3 facts are right.\nScore: 8\nOne of 3 is not.", 8.0),
        ("9/10 dentists are mentioned.\nScore: 6", 6.0),
        ("<think>Score: 3? Or 4?</think>Score: 8", 8.0),
        # Beyond 1..10: clipped by the judge, not here.
        ("Score: 11", 11.0),
        ("Score: 0", 0.0),
        ("Score: -3", -3.0),
        ("Score: −3", -3.0),
        ("Score: 0.5", 0.5),
    ],
)
def test_a_clear_score_is_read(reply: str, score: float) -> None:
    assert read_score(reply) == score


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "A good answer.",
        "Score: eight",
        "Score: N",
        "Score:",
        "8",  # may be the judge's own answer to the question
        "The answer is 8.",
        "The response lists 8 of 10 facts.",
        "9/10 dentists agree.",
        "I would give a score of 8 if it were right.",
        "underscore: 8",
        # several
        "Score: 8\nScore: 7",
        "Score: 8 Score: 7",
        "Score: 8\n7/10",
        "Style score: 8\nFact score: 6",
        'It says "Score: 10".\nScore: 2',
        # ranges
        "Score: 7-8",
        "Score: 7 - 8",
        "Score: 7–8",
        "Score: 7 to 8",
        "Score: 7 or eight",
        "Score: 7, 8",
        "Score: 7\nScore: 7-8",
        "Score: 7 (maybe 8)",
        "Score: 1-10",
        "Score: between 7 and 8",
        "7-8/10",
        "Score: 7+",
        "Score: ~7",
        "Score: >7",
        "Score: 7 and a half",
        "Score: 7½",
        # other scales and other numbers
        "Score: 80%",
        "Score: 80 %",
        "Score: 4/5",
        "Score: 80/100",
        "Score: 8/10.5",
        "Score: 8,5",
        "Score: 1e1",
        "Score: 8th",
        "Score: 8:30",
        "Score:\n1. It is right.\n2. It is short.",
        # the score is still being thought about
        "Score: 8</think>",
    ],
)
def test_what_could_be_meant_otherwise_is_unreadable(reply: str) -> None:
    assert read_score(reply) is None


@given(st.text(alphabet="Score: 0123456789/.-\n*%", max_size=30))
def test_any_reply_is_read_or_not_and_never_raises(reply: str) -> None:
    score = read_score(reply)
    assert score is None or isinstance(score, float)


@given(st.integers(1, 10), st.integers(1, 10))
def test_two_scores_are_read_only_where_they_agree(first: int, second: int) -> None:
    assert read_score(f"Score: {first}\nScore: {second}") == (first if first == second else None)


def test_the_instruction_itself_holds_no_score() -> None:
    assert read_score(TEMPLATE) is None
    assert read_score(REMINDER) is None


def test_a_response_cannot_fetch_other_parts_or_be_taken_for_them() -> None:
    item = GradingItem("{reference} {x} {question}", "secret", question="why {response}?")
    assert message_of("Q {question} A {response} R {reference} {x}", item) == (
        "Q why {response}? A {reference} {x} {question} R secret {x}"
    )


def test_all_references_are_named() -> None:
    assert message_of("{reference}", GradingItem("t", "a", alternatives=("b", "c"))) == "a\nor: b\nor: c"
    assert message_of("{reference}", GradingItem("t", "")) == "(none)"
