"""Plans for data-parallel ranks and micro-batches: partitions, bounds, and how full they are."""

import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megarl.data.packing import balance, microbatches, padded_microbatches, padding_share
from megarl.errors import Refusal

LENGTHS = st.lists(st.integers(1, 300), max_size=60)


@given(LENGTHS, st.integers(1, 9))
def test_balance_is_a_partition_with_equal_counts_and_close_totals(lengths: list[int], num_bins: int) -> None:
    bins = balance(lengths, num_bins)
    assert len(bins) == num_bins
    assert sorted(position for positions in bins for position in positions) == list(range(len(lengths)))
    counts = [len(positions) for positions in bins]
    assert max(counts) - min(counts) <= 1
    totals = [sum(lengths[position] for position in positions) for positions in bins]
    assert max(totals) - min(totals) <= max(lengths, default=0)


@given(LENGTHS, st.integers(300, 900))
def test_microbatches_are_a_partition_within_the_bound_and_few(lengths: list[int], token_bound: int) -> None:
    batches = microbatches(lengths, token_bound)
    assert sorted(position for batch in batches for position in batch) == list(range(len(lengths)))
    assert all(batch for batch in batches)
    totals = [sum(lengths[position] for position in batch) for batch in batches]
    assert all(total <= token_bound for total in totals)
    # No two micro-batches could be one, so at least half the room is used.
    assert all(one + two > token_bound for index, one in enumerate(totals) for two in totals[:index])


@given(LENGTHS, st.randoms())
def test_plans_depend_on_the_lengths_alone(lengths: list[int], source: random.Random) -> None:
    order = list(range(len(lengths)))
    source.shuffle(order)
    shuffled = [lengths[position] for position in order]
    sizes = sorted(sorted(lengths[position] for position in batch) for batch in microbatches(lengths, 600))
    assert sizes == sorted(sorted(shuffled[position] for position in batch) for batch in microbatches(shuffled, 600))


def test_figures_for_answers_of_realistic_lengths() -> None:
    """Log-normal lengths with a cut tail, as sampled answers have: packing wastes little, padding much."""
    source = random.Random(0)
    lengths = [min(2048, int(source.lognormvariate(6.0, 0.7)) + 16) for _ in range(512)]
    batches = microbatches(lengths, 8192)
    filled = sum(lengths) / (len(batches) * 8192)
    assert len(batches) == -(-sum(lengths) // 8192)  # the fewest possible
    assert filled > 0.96
    ranks = [sum(lengths[position] for position in positions) for positions in balance(lengths, 8)]
    assert max(ranks) / (sum(ranks) / 8) < 1.01
    assert padding_share(lengths, [range(512)]) > 0.7


def test_padding_share_in_closed_form() -> None:
    assert padding_share([4, 2, 3], [[0, 1], [2]]) == pytest.approx(2 / 11)
    assert padding_share([], []) == 0.0
    assert padding_share([5, 5], [[0, 1]]) == 0.0


def test_worked_examples() -> None:
    assert balance([10, 1, 1, 1], 2) == [[0, 3], [1, 2]]
    assert balance([3], 2) == [[0], []]
    assert microbatches([6, 6, 6], 6) == [[0], [1], [2]]
    assert microbatches([7, 5, 3, 3, 2], 10) == [[0, 2], [1, 3, 4]]
    assert microbatches([], 10) == []


def test_refusals_name_the_sequence_and_the_setting() -> None:
    with pytest.raises(Refusal, match=r"a sequence of 11 tokens: .*at most 10 tokens.*batch\.tokens_per_microbatch"):
        microbatches([3, 11], 10)
    with pytest.raises(Refusal, match="num_bins=0"):
        balance([1], 0)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(50, 400))
def test_padded_microbatches_bound_what_is_computed(lengths: list[int], bound: int) -> None:
    plan = padded_microbatches(lengths, bound)
    assert sorted(i for batch in plan for i in batch) == list(range(len(lengths)))
    assert all(len(batch) * max(lengths[i] for i in batch) <= bound for batch in plan)
    # The next micro-batch's longest would not have fitted into the one before.
    for batch in plan[:-1]:
        assert (len(batch) + 1) * max(lengths[i] for i in batch) > bound


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 5)), min_size=1, max_size=24),
    st.sampled_from([microbatches, padded_microbatches]),
)
def test_groups_share_a_microbatch(items: list[tuple[int, int]], cut: Callable[..., list[list[int]]]) -> None:
    lengths, groups = [length for length, _ in items], [group for _, group in items]
    rows = max(groups.count(group) for group in groups)
    bound = rows * max(lengths)
    plan = cut(lengths, 2 * rows * bound, groups)
    assert sorted(position for batch in plan for position in batch) == list(range(len(items)))
    for group in groups:
        assert len({i for i, batch in enumerate(plan) for position in batch if groups[position] == group}) == 1


def test_groups_of_one_change_nothing() -> None:
    lengths = [5, 1, 4, 2]
    for cut in (microbatches, padded_microbatches):
        assert cut(lengths, 8, [0, 1, 2, 3]) == cut(lengths, 8)


def test_group_counts_as_a_whole() -> None:
    assert microbatches([5, 1, 4, 2], 6, [7, 7, 3, 3]) == [[0, 1], [2, 3]]
    # Two rows of 5 and two rows of 4, each row padded.
    assert padded_microbatches([5, 1, 4, 2], 10, [7, 7, 3, 3]) == [[0, 1], [2, 3]]
    assert padded_microbatches([5, 1, 4, 2], 20, [7, 7, 3, 3]) == [[0, 1, 2, 3]]
    with pytest.raises(Refusal, match="a sequence of 6 tokens"):
        microbatches([5, 1], 5, [0, 0])
