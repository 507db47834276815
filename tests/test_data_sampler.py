"""The prompt stream: epochs, resumption, independence of seeds."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megarl.data.sampler import MixedStream, PromptStream
from megarl.errors import Refusal


@settings(deadline=None)
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


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.floats(0.1, 9)), min_size=1, max_size=4),
    st.integers(0, 60),
    st.integers(0, 60),
)
def test_a_mixture_keeps_its_shares_at_every_row_and_continues_exactly(
    parts: list[tuple[int, float]], before: int, after: int
) -> None:
    counts, weights = [count for count, _ in parts], [weight for _, weight in parts]
    stream, resumed = (MixedStream(counts, weights, 5, True) for _ in range(2))
    first = stream.take(before)
    resumed.restore(stream.state())
    rest = stream.take(after)
    assert resumed.take(after) == rest
    starts = [sum(counts[:number]) for number in range(len(counts) + 1)]
    for taken in range(1, before + after + 1):
        rows = (first + rest)[:taken]
        for number, weight in enumerate(weights):
            drawn = [row for row in rows if starts[number] <= row < starts[number + 1]]
            assert abs(len(drawn) - taken * weight / sum(weights)) < len(counts)
            whole = len(drawn) // counts[number] * counts[number]
            assert all(drawn[:whole].count(row) == whole // counts[number] for row in set(drawn[:whole]))


def test_a_mixtures_order_is_fixed_for_ever() -> None:
    stream = MixedStream([4, 2], [3.0, 1.0], 1234, True)
    assert stream.take(8) == [0, 1, 5, 3, 2, 1, 4, 3]
    assert stream.epoch == 8 / 6


def test_refusals() -> None:
    with pytest.raises(Refusal, match="num_prompts=0"):
        PromptStream(0, 1, True)
    with pytest.raises(Refusal, match="negative"):
        PromptStream(1, 1, True).restore(-1)
    with pytest.raises(Refusal, match="negative"):
        MixedStream([1], [1.0], 1, True).restore(-1)
