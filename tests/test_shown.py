"""What samples.jsonl and phases.jsonl say: pieces with their advantages, trees, and the ranks' times."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizer_case import KINDS, PROSE, Characters, load_all

from megarl.algorithms.base import Group, Span
from megarl.data.tokenizer import Tokenizer
from megarl.records import Body, Head, Key, Prompt, Stretch
from megarl.train import timeline
from megarl.train.clock import Interval
from megarl.train.inference import Traffic
from megarl.train.measure import staleness
from megarl.train.shown import _chosen, pieces_of, row_of, token_sizes
from megarl.train.timeline import RankTimes, line_of


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    return load_all(tmp_path_factory.mktemp("tokenizers"))


@pytest.mark.parametrize("kind", KINDS)
def test_every_token_has_its_characters(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    if kind not in tokenizers:
        pytest.skip("needs shared/data")
    tokenizer = tokenizers[kind]
    for text in PROSE:
        ids = [*tokenizer.encode(text), tokenizer.eos_token_id]
        said = tokenizer.decode(ids)
        sizes = token_sizes(tokenizer, ids, said)
        assert sizes is not None and len(sizes) == len(ids) and sum(sizes) == len(said)
        assert sizes[-1] == 0 and max(sizes) < len(said)
        place = 0
        for token_id, size in zip(ids, sizes, strict=True):
            own = tokenizer.decode([token_id])
            assert "\ufffd" in own or said[place : place + size].strip() == own.strip()
            place += size
    assert token_sizes(tokenizer, tokenizer.encode("ab"), "something else") is None


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_that_are_no_text_have_a_size_too(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    """As a policy with random weights writes them."""
    if kind not in tokenizers:
        pytest.skip("needs shared/data")
    tokenizer = tokenizers[kind]
    draw = random.Random(0)
    for length in (1, 12, 300):
        ids = [draw.randrange(tokenizer.vocab_size) for _ in range(length)]
        text = tokenizer.decode(ids)
        sizes = token_sizes(tokenizer, ids, text)
        assert sizes is None or (len(sizes) == length and sum(sizes) == len(text))
        # Hugging Face's decoder of bytes looks at all that stand together, letters among them.
        assert sizes is not None or kind not in ("sentencepiece", "byte_level")


def test_a_response_is_cut_where_its_writer_or_its_advantage_changes() -> None:
    tokenizer = Characters()
    stretches = (Stretch(0, 4, "policy", 1), Stretch(4, 6, "environment", 1), Stretch(6, 9, "policy", 1))
    head = Head(Key(5, 0, 1), 0, stretches, reward=1.0, marks={"thinking": 2})
    ids = [*tokenizer.encode("abcdEFgh"), tokenizer.eos_token_id]
    spans = (Span(0, 3, 0.5), Span(3, 4, -1.5), Span(6, 9))
    assert pieces_of(tokenizer, head, ids, spans) == [
        {"text": "ab", "by": "policy", "tokens": 2, "advantage": 0.5, "sizes": [1, 1]},
        {"text": "c", "by": "policy", "tokens": 1, "advantage": 0.5, "sizes": [1]},
        {"text": "d", "by": "policy", "tokens": 1, "advantage": -1.5, "sizes": [1]},
        {"text": "EF", "by": "environment", "tokens": 2, "sizes": [1, 1]},
        {"text": "gh", "by": "policy", "tokens": 3, "advantage": None, "sizes": [1, 1, 0]},
    ]
    prompt = Prompt(5, (1,), "2+2=", "4", extra={"level": 3})
    row = row_of(tokenizer, 7, prompt, head, Body(tuple(ids), texts=("abcd", "EF", "gh")), spans[:2])
    assert row["advantage"] == 0.0 and row["level"] == "3" and row["length"] == 9 and row["response"] == "abcdEFgh"
    assert [turn["by"] for turn in row["turns"]] == ["policy", "environment", "policy"]
    assert not {"branch", "fork", "draw", "source"} & row.keys()
    assert row_of(tokenizer, 7, prompt, head, Body(tuple(ids)), ())["advantage"] is None
    json.dumps(row, allow_nan=False)


def test_what_goes_on_from_an_answer_stands_behind_it() -> None:
    def head(number: int, *branch: int) -> Head:
        return Head(Key(4, 0, number, branch=branch), 0, (Stretch(0, 3, "policy", 1),), fork=2 if branch else 0)

    first = Group(0, Prompt(4, (1,), "p", "a"), 0, (head(0), head(1), head(2)))
    grown = Group(0, first.prompt, 0, (*first.heads, head(1, 1), head(0, 0), head(1, 0), head(2, 0)))
    chosen = [one.key[2:] for _, one in _chosen(2, [first], [grown])]
    assert [(number, branch) for number, _, branch in chosen] == [(0, ()), (0, (0,)), (1, ()), (1, (0,)), (1, (1,))]
    assert _chosen(0, [first], [grown]) == []
    row = row_of(Characters(), 1, first.prompt, head(1, 0), Body((75, 76, 77), text="ABC"), (Span(2, 3, 1.0),))
    assert (row["branch"], row["fork"]) == ([0], 2)
    assert [piece.get("advantage") for piece in row["pieces"]] == [None, 1.0]


def test_staleness_counts_tokens_of_the_policys() -> None:
    def group(*stretches: Stretch) -> Group:
        return Group(0, Prompt(0, (1,), "p", "a"), 0, (Head(Key(0, 0, 0), 0, stretches),))

    old, new = Stretch(0, 1, "policy", 3), Stretch(3, 6, "policy", 4)
    assert staleness([group(old, Stretch(1, 3, "environment", 0), new)], 5) == {
        "staleness_mean": 0.25,
        "staleness_max": 1,
    }
    assert staleness([group(Stretch(0, 4, "policy", None))], 5) == {} == staleness([], 5)


def times(slow: float, push: int = 0) -> RankTimes:
    intervals = [Interval("push", 0.0, 0.5), Interval("generate", 0.5, slow), Interval("push", 0.5 + slow, 0.25)]
    return RankTimes(intervals, {"train": 7}, Traffic(2, push, 3 * push, 0.125 + slow))


def test_a_line_of_phases_has_the_slowest_and_the_fastest_rank() -> None:
    line = line_of(3, "step", [times(1.0, 4), times(2.0, 5)])
    assert line["slowest"] == {"push": 0.75, "generate": 2.0} and line["fastest"] == {"push": 0.75, "generate": 1.0}
    assert line["push_seconds"] == 2.125 and line["world"] == 2
    assert line["ranks"]["1"] == {
        "phases": [["push", 0.0, 0.5], ["generate", 0.5, 2.0], ["push", 2.5, 0.25]],
        "memory": {"train": 7},
        "push": {"sent": 5, "received": 15, "seconds": 2.125},
    }


def test_a_large_world_keeps_the_ranks_that_tell_most() -> None:
    ranks = [times(1.0) for _ in range(1000)]
    ranks[777], ranks[501] = times(9.0), times(0.5)
    line = line_of(1, "step", ranks)
    assert line["world"] == 1000 and len(line["ranks"]) == timeline.RANKS
    assert {"0", "777", "501"} <= line["ranks"].keys()
    assert len(json.dumps(line)) < 20_000


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_advantage_that_is_none_is_null(value: float, tmp_path: Path) -> None:
    head = Head(Key(5, 0, 1), 0, (Stretch(0, 2, "policy", 1),))
    row: dict[str, Any] = row_of(Characters(), 1, Prompt(5, (1,), "p", "a"), head, Body((75, 76)), (Span(0, 2, value),))
    assert row["advantage"] is None and row["pieces"][0]["advantage"] is None
