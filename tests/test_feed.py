"""What waits from one step to the next: how old it may be, and that it comes back from files for whoever reads them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from group_case import group_of

from megarl.algorithms.base import Group
from megarl.algorithms.plan import Fork, Growth
from megarl.errors import MegarlError
from megarl.records import Body, Key, Prompt, Stretch
from megarl.train.feed import Feed
from megarl.train.groups import Begun, Made
from megarl.train.waiting import Place


def written_by(version: int | None) -> Group:
    """A group whose second answer was written in two parts, the later one by weights `version`."""
    group = group_of([1.0, 0.0], [3, 3])
    first, second = group.heads
    second = replace(second, stretches=(Stretch(0, 1, "environment", 0), Stretch(1, 3, "policy", version)))
    first = replace(first, stretches=(Stretch(0, 3, "policy", version),))
    return replace(group, heads=(first, second))


#: The only rank of a run.
ALONE = Place(0, 1, 1)


def feed(ahead: int = 1, place: Place = ALONE) -> Feed:
    return Feed(ahead, place, [prompt(7), prompt(9)])


def prompt(index: int) -> Prompt:
    return Prompt(index, (5, index), f"prompt {index}", "answer")


@pytest.mark.parametrize(("ahead", "version"), [(0, 6), (1, 6), (1, 5)])
def test_tokens_may_be_as_old_as_a_run_is_ahead(ahead: int, version: int | None) -> None:
    feed(ahead).require_fresh(7, [written_by(version), written_by(None)])


def test_older_tokens_are_refused() -> None:
    said = r"step 7 would learn from tokens that the weights after step {} made, {} steps before it: the bound is {}"
    for ahead, version in ((0, 5), (1, 4)):
        with pytest.raises(MegarlError, match=said.format(version, 6 - version, ahead)):
            feed(ahead).require_fresh(7, [written_by(6), written_by(version)])


#: Of four replicas of two ranks each, the samples of two prompts.
HELD = {0: [Key(7, 0, 0), Key(9, 0, 1)], 2: [Key(7, 0, 1)], 4: [], 6: [Key(9, 0, 0)]}


def begun(rank: int) -> Begun:
    """What rank `rank` of these has."""
    groups = []
    for number, index in enumerate((7, 9)):
        group = group_of([1.0, 0.5], [3, 2], number=number, prompt=prompt(index))
        holders = {key: holder for holder, keys in HELD.items() for key in keys}
        heads = [
            replace(head, holder=holders[head.key], measured={"influence": (0.25, 1.0)}, old_known=head.length)
            for head in group.heads
        ]
        groups.append(replace(group, heads=tuple(heads)))
    growths = (Growth((Fork(Key(7, 0, 0), 1, 2), Fork(Key(7, 0, 0), 2, 2))), Growth())
    bodies = {
        key: Body((1, 2, key.prompt), (-0.1, math.nan, -0.3), f"text {key.number}", 2**62, old_log_probs=(-0.5, -1 / 3))
        for key in HELD.get(rank, ())
    }
    return Begun(tuple(groups), growths, bodies)


@pytest.mark.parametrize(("replicas", "tensor"), [(4, 2), (2, 1), (3, 2), (8, 1)])
def test_what_waits_comes_back_for_other_replicas(tmp_path: Path, replicas: int, tensor: int) -> None:
    for rank in range(8):
        saved = feed(place=Place(rank, 4, 2))
        assert saved.exchange(begun(rank)) is None
        saved.write(saved.state(), tmp_path)
    found: dict[Key, tuple[int, Body]] = {}
    for rank in range(replicas * tensor):
        again = feed(place=Place(rank, replicas, tensor))
        again.read(tmp_path)
        waited = again.exchange(None)
        assert waited is not None and again.state() is None
        assert [(group.number, group.prompt, group.draw) for group in waited.groups] == [
            (0, prompt(7), 0),
            (1, prompt(9), 0),
        ]
        assert waited.growths == begun(0).growths
        found |= {key: (rank, body) for key, body in waited.bodies.items()}
        for group, before in zip(waited.groups, begun(0).groups, strict=True):
            for head, old in zip(group.heads, before.heads, strict=True):
                assert replace(head, holder=old.holder) == old
                assert old.holder is not None and head.holder == old.holder // 2 % replicas * tensor
                assert (head.holder == rank) == (head.key in waited.bodies)
    held = {key: body for rank in HELD for key, body in begun(rank).bodies.items()}
    assert found.keys() == held.keys()
    for key, (_, body) in found.items():
        assert body.token_ids == held[key].token_ids and body.seed == 2**62 and body.text == held[key].text
        assert body.log_probs[0] == pytest.approx(-0.1) and math.isnan(body.log_probs[1])
        assert body.old_log_probs == pytest.approx((-0.5, -1 / 3))


def test_nothing_waits_where_nothing_was_saved(tmp_path: Path) -> None:
    empty = feed()
    empty.write(empty.state(), tmp_path)
    assert list(tmp_path.iterdir()) == []
    empty.exchange(begun(0))
    empty.read(tmp_path)
    assert empty.waiting is None


def test_continuations_join_the_groups_that_they_go_on_from() -> None:
    first = begun(0)
    (parent,) = [head for head in first.groups[0].heads if head.key == Key(7, 0, 0)]
    heads = [replace(parent, key=parent.key._replace(branch=(number,)), fork=1) for number in range(2)]
    body = Body((1, 8))
    groups, bodies = first.completed(Made(continuations=tuple(heads), bodies={heads[0].key: body}))
    assert groups[0].heads == (*first.groups[0].heads, *heads) and groups[1] == first.groups[1]
    assert bodies == {**first.bodies, heads[0].key: body} and heads[1].parent == parent.key
