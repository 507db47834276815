"""The prompt stream: epochs, resumption, independence of seeds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megarl.data.sampler import PromptStream
from megarl.errors import Refusal


@given(st.integers(1, 40), st.integers(0, 2**40), st.booleans(), st.lists(st.integers(0, 25), max_size=12))
def test_any_way_of_taking_gives_the_same_stream_and_each_epoch_every_row(
    num_prompts: int, seed: int, shuffle: bool, counts: list[int]
) -> None:
    total = sum(counts)
    whole = PromptStream(num_prompts, seed, shuffle).take(total)
    stream = PromptStream(num_prompts, seed, shuffle)
    pieces = []
    for count in counts:
        resumed = PromptStream(num_prompts, seed, shuffle)
        resumed.restore(stream.state())
        piece = stream.take(count)
        assert resumed.take(count) == piece
        pieces += piece
    assert pieces == whole
    assert stream.state() == total
    for start in range(0, total - num_prompts + 1, num_prompts):
        assert sorted(whole[start : start + num_prompts]) == list(range(num_prompts))


def test_restoring_backwards_repeats_the_rows() -> None:
    stream = PromptStream(10, 3, True)
    first = stream.take(25)
    stream.restore(7)
    assert stream.take(18) == first[7:]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    stream = PromptStream(50, 1, True)
    first, second = stream.take(50), stream.take(50)
    other = PromptStream(50, 2, True).take(50)
    assert len({tuple(first), tuple(second), tuple(other), tuple(range(50))}) == 4


def test_the_order_is_fixed_for_ever() -> None:
    # A changed order would silently break the exact resumption of runs saved earlier.
    assert PromptStream(8, 1234, True).take(10) == [7, 5, 2, 4, 1, 0, 3, 6, 2, 3]


def test_refusals() -> None:
    with pytest.raises(Refusal, match="num_prompts=0"):
        PromptStream(0, 1, True)
    with pytest.raises(Refusal, match="negative"):
        PromptStream(1, 1, True).restore(-1)
