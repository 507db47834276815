"""Steps, branch points, trees and their advantages: worked by hand, and the identities A1 to A4, A6 and A8."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megarl.algorithms.steps import branch_points, scored, step_starts
from megarl.algorithms.trees import ROOT, expanded, next_prompts, trees_wanted, valued


@pytest.mark.parametrize(
    ("pieces", "starts"),
    [
        ([], ()),
        (["a"], (0,)),
        (["a", "\n\n", "b"], (0, 2)),
        # In the middle of a token, or over two; at the end of the response there is no further step.
        (["a.\n\nb", "c", "\n", "\nd", "e\n\n"], (0, 1, 4)),
        (["a", "\n\n\n", "b", "\n\n"], (0, 2)),
        # Single line breaks where there are no blank lines, tokens where there is neither.
        (["a\n", "b", "\n", "c"], (0, 1, 3)),
        (["a", "b", "c"], (0, 1, 2)),
        (["a", "b\n\n"], (0, 1)),
    ],
)
def test_steps_end_where_a_separator_does(pieces: list[str], starts: tuple[int, ...]):
    assert step_starts(pieces) == starts


@given(st.lists(st.sampled_from(["a", "\n", "\n\n", "b\n\nc", "\nd", "e\n"]), min_size=1))
def test_steps_cover_a_response_however_it_is_cut_into_tokens(pieces: list[str]):
    starts = step_starts(pieces)
    assert starts[0] == 0 and list(starts) == sorted(set(starts)) and starts[-1] < len(pieces)


def test_scores_of_the_first_step_and_of_what_comes_behind_the_thinking_are_none():
    values, starts = np.array([5.0, 1.0, 2.0, 3.0]), [0, 10, 20, 30]
    assert scored(values, starts, 40, None).tolist() == [0, 1, 2, 3]
    # The thinking ends in step 2, in its midst and with its last token; and in the last one.
    for thought in (21, 30):
        assert scored(values, starts, 40, thought).tolist() == [0, 1, 0, 0]
    assert scored(values, starts, 40, 31).tolist() == [0, 1, 2, 0]
    assert scored(np.array([]), [], 0, None).tolist() == []


def test_branch_points_are_the_earliest_of_the_highest():
    starts = [0, 600, 700, 1300, 1900, 2500]
    scores = [0.0, 1.0, 9.0, 3.0, 9.0, 0.0]
    assert branch_points(scores, starts) == ((700, 1900), 2)
    assert branch_points(scores, starts, count=1) == ((700,), 1)
    # One by score; the earliest other step fills, as near as it may be.
    assert branch_points([0.0, 1.0, 9.0, 3.0, 2.0, 0.0], starts, quantile=0.9) == ((600, 700), 1)
    # What is before the response counts for the distance from the beginning, not for that of two steps.
    near = [0, 100, 700, 1250, 1800]
    assert branch_points([0.0, 9.0, 9.0, 9.0, 9.0], near, quantile=0.0).places == (700, 1800)
    assert branch_points([0.0, 9.0, 9.0, 9.0, 9.0], near, quantile=0.0, before=500).places == (100, 1250)
    # None by score is far enough.
    assert branch_points(scores, starts, gap=5000) == ((600, 700), 0)


def test_where_most_scores_are_nothing_the_least_of_the_others_is_enough():
    starts = list(range(0, 1000, 100))
    scores = [0.0] * 8 + [1.0, 2.0]
    assert branch_points(scores, starts, gap=0, quantile=0.5) == ((800, 900), 2)
    assert branch_points([0.0] * 10, starts, gap=0) == ((100, 200), 0)


def test_a6_no_step_behind_the_thinking_is_chosen_by_score():
    starts, values = [0, 600, 1200, 1800], np.array([0.0, 1.0, 0.5, 9.0])
    scores = scored(values, starts, 2400, 1801)
    assert branch_points(scores, starts, quantile=0.5, gap=0) == ((600, 1200), 2)
    # They serve to fill.
    assert branch_points(scored(values, starts, 2400, 601), starts, count=3) == ((600, 1200, 1800), 0)


def test_a_response_of_few_steps_branches_there_again_and_of_one_nowhere():
    assert branch_points([0.0], [0]) == branch_points([], []) == ((), 0)
    assert branch_points([0.0, 0.0], [0, 7]) == ((7, 7), 0)
    assert branch_points([0.0, 0.0, 1.0], [0, 7, 9], count=5, gap=0) == ((7, 7, 7, 9, 9), 1)


#: Two first samples; the first is continued twice before each of two steps: segments 0, 1 and 2 are its own path.
PARENTS = [ROOT, 0, 1, 0, 0, 1, 1, ROOT]
REWARDS = {2: 1.0, 3: 0.0, 4: 0.0, 5: 1.0, 6: 0.0, 7: 1.0}


def test_a_tree_worked_by_hand():
    """Leaves under segment 0: 1, 0, 0, 1, 0; under segment 1: 1, 1, 0; all: 3 of 6 are right."""
    found, root = valued(PARENTS, REWARDS)
    assert root == 0.5
    assert [(one.value, one.leaves) for one in found[:3]] == [(0.4, 5), (2 / 3, 3), (1.0, 1)]
    assert found[0].advantage == pytest.approx(2 * (0.4 - 0.5) / math.sqrt(5))
    assert found[1].advantage == pytest.approx(((2 / 3 - 0.5) + (2 / 3 - 0.4)) / math.sqrt(3))
    assert found[2].advantage == pytest.approx((1 - 0.5) + (1 - 2 / 3))
    assert found[3].advantage == pytest.approx((0 - 0.5) + (0 - 0.4))
    assert found[6].advantage == pytest.approx((0 - 0.5) + (0 - 2 / 3))
    assert found[7].advantage == pytest.approx(2 * (1 - 0.5))


def test_a4_leaves_of_a_path():
    assert [one.leaves for one in valued(PARENTS, REWARDS)[0][:3]] == [5, 3, 1]


def test_a1_without_a_branch_it_is_twice_the_distance_from_the_mean():
    rewards = dict(enumerate([1.0, 0.0, 0.0, 1.0, 0.0, 0.0]))
    found, root = valued([ROOT] * 6, rewards)
    assert [one.advantage for one in found] == pytest.approx([2 * (reward - root) for reward in rewards.values()])


@st.composite
def trees(draw: st.DrawFn) -> tuple[list[int], dict[int, float]]:
    parents = [ROOT]
    for number in range(1, draw(st.integers(1, 12))):
        parents.append(draw(st.integers(ROOT, number - 1)))
    leaves = set(range(len(parents))) - set(parents)
    return parents, {leaf: draw(st.sampled_from([0.0, 0.25, 1.0])) for leaf in leaves}


@given(trees())
def test_a2_a3_values_balance_at_every_node_and_telescope_along_every_path(tree: tuple[list[int], dict[int, float]]):
    parents, rewards = tree
    found, root = valued(parents, rewards)
    for node in (ROOT, *parents):
        children = [number for number, parent in enumerate(parents) if parent == node]
        value = root if node == ROOT else found[node].value
        assert sum(found[one].leaves * (found[one].value - value) for one in children) == pytest.approx(0, abs=1e-9)
    for leaf, reward in rewards.items():
        local, node = 0.0, leaf
        while node != ROOT:
            above = root if parents[node] == ROOT else found[parents[node]].value
            local += found[node].value - above
            node = parents[node]
        assert local == pytest.approx(reward - root)
    equal, _ = valued(parents, dict.fromkeys(rewards, 1.0))
    assert all(one.advantage == 0 for one in equal)


def test_what_is_no_tree_is_an_error():
    with pytest.raises(ValueError, match="must come before their children"):
        valued([1, ROOT], {0: 1.0})
    with pytest.raises(ValueError, match="must be those of the segments without children"):
        valued([ROOT, 0], {0: 1.0, 1: 1.0})


@pytest.mark.parametrize(("right", "wanted"), [(0, 6), (1, 6), (2, 5), (3, 4), (4, 4), (5, 3), (6, 3)])
def test_fewer_trees_grow_where_more_is_right(right: int, wanted: int):
    samples = [number < right for number in range(6)]
    assert trees_wanted(samples) == wanted
    found = expanded(samples, wanted, random.Random(0))
    assert len(found) == wanted and list(found) == sorted(set(found))
    # All of the smaller class are among them, of the wrong ones where both are of one size.
    few = [number for number in range(6) if samples[number] == (right < 3)]
    assert right in (0, 6) or set(few) <= set(found)


def test_a8_a_step_with_as_many_as_wanted_keeps_its_size():
    assert next_prompts(64, 64, 1920, 1920, 16, 256) == 64
    assert next_prompts(64, 64, 1920, 960, 16, 256) == round(0.9 * 64 + 0.1 * 2 * 64) == 70
    # What gave them was asked when there were fewer.
    assert next_prompts(80, 64, 1920, 960, 16, 256) == round(0.9 * 80 + 0.1 * 2 * 64)
    assert next_prompts(64, 64, 1920, 10, 16, 256) == 256 and next_prompts(16, 16, 1920, 9600, 16, 256) == 16
    # Where nothing had a signal, the most; where nothing is to move, what there is.
    assert next_prompts(64, 64, 1920, 0, 16, 256) == 256
    assert next_prompts(64, 64, 1920, 0, 64, 64, rate=0.0) == 64
