"""Texts that are used again when their prompt returns: how long, whose, and from a checkpoint."""

from __future__ import annotations

import json

import pytest

from megarl.algorithms.plan import Generation, Text
from megarl.records import Key
from megarl.train.carry import Carry
from megarl.train.saving import forgotten
from megarl.train.text_cache import TextCache

HINT = Generation(2, "hint", refresh_every=3)
NAME = Generation(1, "name", refresh_every=2)


def key(prompt: int, number: int = 0, *, draw: int = 0, kind: str = "hint") -> Key:
    return Key(prompt, draw, number, kind)


def kept() -> TextCache:
    """Of prompt 7 two hints and a name, made in step 4; of prompt 70 a hint, made in step 5."""
    texts = TextCache()
    texts.keep(4, key(7), Text((1, 2), {"chain": 1}))
    texts.keep(4, key(7, 1), Text((3,)))
    texts.keep(4, key(7, kind="name"), Text((4, 5)))
    texts.keep(5, key(70), Text((6,)))
    return texts


def test_texts_are_used_for_as_many_steps_as_their_generation_says() -> None:
    texts = kept()
    hints = {0: Text((1, 2), {"chain": 1}), 1: Text((3,))}
    # In the step that makes them they are there already; they are used in the two after it.
    assert [texts.of(HINT, 7, step) for step in (4, 5, 6, 7)] == [None, hints, hints, None]
    assert [texts.of(NAME, 7, step) for step in (4, 5, 6)] == [None, {0: Text((4, 5))}, None]
    assert texts.of(HINT, 8, 5) is None and texts.of(NAME, 70, 6) is None


def test_of_a_prompt_drawn_twice_the_first_draws_texts_are_kept_and_later_steps_replace_them() -> None:
    texts = kept()
    texts.keep(4, key(7, draw=1), Text((9,)))
    assert texts.of(HINT, 7, 5) == {0: Text((1, 2), {"chain": 1}), 1: Text((3,))}
    texts.keep(7, key(7), Text((8,)))
    assert texts.of(HINT, 7, 8) == {0: Text((8,))} and texts.of(NAME, 7, 5) == {0: Text((4, 5))}


def test_what_is_too_old_is_forgotten_and_nothing_else() -> None:
    texts = kept()
    texts.forget(NAME, 5)
    assert sorted(texts.state()) == ["hint 7", "hint 70"]
    texts.forget(HINT, 5)
    assert sorted(texts.state()) == ["hint 7", "hint 70"]
    texts.forget(HINT, 6)
    assert sorted(texts.state()) == ["hint 70"]


def test_a_state_that_was_saved_stays_as_it_was_and_comes_back_through_json() -> None:
    texts, again = kept(), TextCache()
    state = texts.state()
    before = json.dumps(state)
    texts.keep(6, key(7), Text((8,)))
    texts.keep(5, key(70, 1), Text((8,)))
    texts.forget(HINT, 6)
    assert json.dumps(state) == before
    again.restore(json.loads(before))
    for generation, prompt, step in ((HINT, 7, 5), (HINT, 70, 6), (NAME, 7, 5)):
        assert again.of(generation, prompt, step) == kept().of(generation, prompt, step) is not None
    # Texts that join later are the same as without the checkpoint between.
    again.keep(5, key(70, 1), Text((8,)))
    assert again.of(HINT, 70, 6) == {0: Text((6,)), 1: Text((8,))}


@pytest.mark.parametrize("anew", [{}, {"texts": "the data changed"}])
def test_texts_to_other_rows_are_not_taken_up_and_that_is_said(anew: dict[str, str]) -> None:
    states = {"texts": json.loads(json.dumps(kept().state()))}
    texts = TextCache()
    Carry({"texts": texts}).restore(states, anew=anew)
    assert (texts.of(HINT, 7, 5) is None) == bool(anew)
    said = "begins anew what the checkpoint carries of texts (the data changed)" if anew else None
    assert forgotten(states, anew) == said
    assert forgotten({"texts": {}}, anew) is None
