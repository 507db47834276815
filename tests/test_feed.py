"""How old the weights may be that made what a step learns from."""

from __future__ import annotations

from dataclasses import replace

import pytest
from group_case import group_of

from megarl.errors import MegarlError
from megarl.records import Stretch
from megarl.train.feed import Feed
from megarl.train.groups import Kept, Made, Rollouts


def made_by(version: int | None, number: int) -> Rollouts:
    """A group whose second answer was written in two parts, the later one by weights `version`."""
    group = group_of([1.0, 0.0], [3, 3], number=number)
    first, second = group.heads
    second = replace(second, stretches=(Stretch(0, 1, "environment", 0), Stretch(1, 3, "policy", version)))
    first = replace(first, stretches=(Stretch(0, 3, "policy", version),))
    return Rollouts(Made(), Kept((replace(group, heads=(first, second)),)))


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_rollouts_are_made_ahead_as_far_as_the_bound_goes_and_learned_in_their_order(staleness: int) -> None:
    feed, made = Feed(5, staleness), []
    for step in range(1, 6):

        def make(ahead: int, now: int = step) -> Rollouts:
            made.append(ahead)
            return made_by(now - 1, ahead)

        assert feed.take(step, make).kept.groups[0].number == step
        assert made == list(range(1, min(step + staleness, 5) + 1))
    # Nothing is drawn for a step that the run does not make, and so the last checkpoint can be saved.
    feed.require_empty()


def test_older_tokens_are_refused_and_those_of_unknown_weights_are_not() -> None:
    assert Feed(9).take(7, lambda step: made_by(6, step))
    assert Feed(9).take(7, lambda step: made_by(None, step))
    said = r"step 7 would learn from tokens that the weights after step 5 made, 1 steps before it: the bound is 0"
    with pytest.raises(MegarlError, match=said):
        Feed(9).take(7, lambda step: made_by(5, step))


def test_a_checkpoint_is_saved_where_nothing_waits() -> None:
    feed = Feed(9)
    feed.take(1, lambda step: made_by(0, step))
    feed.require_empty()
    ahead = Feed(9, 1)
    ahead.take(1, lambda step: made_by(0, step))
    with pytest.raises(MegarlError, match="1 steps' rollouts wait"):
        ahead.require_empty()
