"""The place of a text in its tokens, against a search through all prefixes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_case import KINDS, byte_ids, choose, load_all

from megarl.data.prefixes import tokens_until
from megarl.data.tokenizer import Tokenizer

PIECES = ["é日本😀", "the ", " ", "\\boxed{", "4", "</think>", "\n\n", "日", "x"]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    return load_all(tmp_path_factory.mktemp("tokenizers"))


def prefixes(tokenizer: Tokenizer, token_ids: list[int]) -> list[str]:
    return [tokenizer.decode(token_ids[:count]) for count in range(len(token_ids) + 1)]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_it_is_the_first_prefix_that_reaches_the_text(
    tokenizers: dict[str, Tokenizer], kind: str, data: st.DataObject
) -> None:
    """For texts in words, in single bytes and cut in the middle of a character, and for any tokens between."""
    tokenizer = choose(tokenizers, kind)
    token_ids: list[int] = []
    for piece in data.draw(st.lists(st.sampled_from(PIECES), max_size=8)):
        raw = data.draw(st.booleans())
        ids = byte_ids(tokenizer, kind, piece) if raw else tokenizer.encode(piece)
        token_ids += ids[: data.draw(st.integers(0, len(ids)))] if data.draw(st.integers(0, 5)) == 0 else ids
        token_ids += data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=1))
    seen = prefixes(tokenizer, token_ids)
    text = seen[-1]
    for end in range(len(text) + 1):
        if text[:end].endswith("\ufffd"):
            continue
        expected = next(count for count, prefix in enumerate(seen) if prefix.startswith(text[:end]))
        assert tokens_until(tokenizer, token_ids, text[:end]) == expected


def test_more_bytes_can_make_the_text_before_them_look_broken(tokenizers: dict[str, Tokenizer]) -> None:
    """What the search must not trip over: "xy" is there after 2 tokens, gone after 3, and back after 4 and 8."""
    tokenizer = tokenizers["hugging_face"]
    token_ids = byte_ids(tokenizer, "hugging_face", "xyé😀")
    reached = [prefix.startswith("xy") for prefix in prefixes(tokenizer, token_ids)]
    assert reached == [False, False, True, False, True, False, False, False, True]
    assert tokens_until(tokenizer, token_ids, "xy") == 2
