"""Token F1 against values worked out by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megarl.rewards.answers import scaled
from megarl.rewards.text import token_f1


@pytest.mark.parametrize(
    ("text", "reference", "f1"),
    [
        ("Paris", "Paris", 1.0),
        ("the Paris", "PARIS!", 1.0),
        ("It is Paris", "Paris", 2 * 1 / (3 + 1)),  # precision 1/3, recall 1
        ("Paris", "Paris in France", 2 * 1 / (1 + 3)),
        ("an apple a day", "the apple day", 1.0),  # articles go, wherever they stand
        ("a b b c", "b b b d", 2 * 2 / (3 + 4)),  # b twice in both; "a" is an article
        ("well-known fact", "wellknown fact", 1.0),  # a hyphen goes without leaving a blank
        ("theatre", "the atre", 0.0),  # articles are whole words
        ("1,000", "1000", 1.0),
        ("$5", "5", 1.0),
        ("it’s “fine”", 'it\'s "fine"', 1.0),  # beyond ASCII too
        ("Zürich", "zürich", 1.0),
        ("one\ttwo\nthree", "three two one", 1.0),  # order does not count
        ("London", "Paris", 0.0),
        ("", "", 1.0),
        ("", "Paris", 0.0),
        ("Paris", "", 0.0),
        ("the", "", 1.0),  # nothing is left of either
        ("the", "an", 1.0),
        ("...", "Paris", 0.0),
    ],
)
def test_token_f1(text: str, reference: str, f1: float) -> None:
    assert token_f1(text, reference) == pytest.approx(f1, abs=1e-12)


@given(st.text(alphabet="ab the.,", max_size=20), st.text(alphabet="ab the.,", max_size=20))
def test_token_f1_is_symmetric_bounded_and_one_for_itself(text: str, other: str) -> None:
    assert token_f1(text, other) == token_f1(other, text)
    assert 0.0 <= token_f1(text, other) <= 1.0
    assert token_f1(text, text) == 1.0


@given(
    st.floats(0, 1), st.floats(-1e3, 1e3).flatmap(lambda low: st.tuples(st.just(low), st.floats(low, 1e3 + abs(low))))
)
def test_a_scaled_share_stays_within_its_bounds(share: float, bounds: tuple[float, float]) -> None:
    low, high = bounds
    assert low <= scaled(share, low, high) <= high
    assert (scaled(0.0, low, high), scaled(1.0, low, high)) == (low, high)
