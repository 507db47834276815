"""Which sequence goes where: over data-parallel ranks, and into micro-batches. Pure and torch-free.

All functions take the sequences' lengths in tokens and return positions in that list. They depend on nothing
but their arguments, so every rank computes the same plan.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

from megarl.errors import Refusal


def balance(lengths: Sequence[int], num_bins: int) -> list[list[int]]:
    """Spread sequences over `num_bins` data-parallel ranks, equal in number and nearly equal in tokens.

    Counts differ by at most one. Rounds of `num_bins` sequences, longest first, are dealt out so that the
    longest of a round joins the rank with the fewest tokens. Token totals then differ by at most the longest length:
    two ranks' totals move apart in a round only by what two of its lengths differ, and never add to an
    earlier lead.

    Returns `num_bins` lists of positions, each ascending; together every position once.

    >>> balance([5, 1, 4, 2], 2)
    [[0, 1], [2, 3]]
    """
    if num_bins < 1:
        raise Refusal(f"num_bins={num_bins}", "must be at least 1", "give the number of data-parallel ranks")
    longest_first = sorted(range(len(lengths)), key=lambda position: (-lengths[position], position))
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    totals = [0] * num_bins
    for start in range(0, len(lengths), num_bins):
        emptiest_first = sorted(range(num_bins), key=lambda index: (totals[index], index))
        for index, position in zip(emptiest_first, longest_first[start : start + num_bins], strict=False):
            bins[index].append(position)
            totals[index] += lengths[position]
    return [sorted(positions) for positions in bins]


def microbatches(lengths: Sequence[int], token_bound: int, groups: Sequence[int] | None = None) -> list[list[int]]:
    """Pack sequences into few micro-batches of at most `token_bound` tokens each.

    Best fit, longest first: each sequence joins the fullest micro-batch that still has room (at most 11/9 of
    the least possible number of micro-batches, plus one). Costs O(n log n) comparisons. Sequences of the same
    number in `groups` share a micro-batch.

    Returns lists of positions, each ascending; together every position once. Raises `Refusal` where one sequence
    (or group) alone exceeds the bound.

    >>> microbatches([5, 1, 4, 2], 6)
    [[0, 1], [2, 3]]
    """
    if groups is not None:
        units = _units(groups)
        sums = [sum(lengths[position] for position in unit) for unit in units]
        return _flat(units, microbatches(sums, token_bound))
    _check_bound(lengths, token_bound)
    batches: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (tokens left, micro-batch), ascending
    for position in sorted(range(len(lengths)), key=lambda position: (-lengths[position], position)):
        slot = bisect_left(free, (lengths[position], -1))
        if slot == len(free):
            left, index = token_bound, len(batches)
            batches.append([])
        else:
            left, index = free.pop(slot)
        batches[index].append(position)
        insort(free, (left - lengths[position], index))
    return [sorted(batch) for batch in batches]


def padded_microbatches(
    lengths: Sequence[int], token_bound: int, groups: Sequence[int] | None = None
) -> list[list[int]]:
    """Indices of each micro-batch when every sequence has a row padded to the longest of its micro-batch.

    Rows times the longest stays within `token_bound`. Sequences of like length come together; the plan is
    deterministic. Sequences of the same number in `groups` share a micro-batch. Raises `Refusal` for a sequence (or
    group) that exceeds the bound.
    """
    if groups is not None:
        units = _units(groups)
        # Every unit as if it had as many rows as the largest.
        rows = max(map(len, units), default=1)
        longest = [rows * max(lengths[position] for position in unit) for unit in units]
        return _flat(units, padded_microbatches(longest, token_bound))
    _check_bound(lengths, token_bound)
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        # Sorted by length, so the first of a micro-batch is its longest.
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > token_bound:
            batches.append([])
        batches[-1].append(index)
    return batches


def _units(groups: Sequence[int]) -> list[list[int]]:
    """Positions that share a group, in order of their first."""
    units: dict[int, list[int]] = {}
    for position, group in enumerate(groups):
        units.setdefault(group, []).append(position)
    return list(units.values())


def _flat(units: list[list[int]], batches: list[list[int]]) -> list[list[int]]:
    """Batches of units as batches of positions."""
    return [sorted(position for unit in batch for position in units[unit]) for batch in batches]


def _check_bound(lengths: Sequence[int], token_bound: int) -> None:
    longest = max(lengths, default=0)
    if longest > token_bound:
        raise Refusal(
            f"a sequence of {longest} tokens",
            f"must fit into one micro-batch of at most {token_bound} tokens",
            f"set batch.tokens_per_microbatch to at least {longest}, or shorten prompts or responses",
        )


def padding_share(lengths: Sequence[int], batches: Sequence[Sequence[int]]) -> float:
    """Share of positions that would hold padding if each batch were a rectangle as wide as its longest sequence.

    0.0 where there are no tokens.
    """
    used = sum(lengths[position] for batch in batches for position in batch)
    held = sum(len(batch) * max(lengths[position] for position in batch) for batch in batches if batch)
    return 1.0 - used / held if held else 0.0
