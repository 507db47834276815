"""Where the thinking ends, for markers that are one token and for those that are several."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers as tokenizers_library
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data_tokenizer import hugging_face_folder, sentencepiece_model
from tokenizer_case import KINDS, byte_ids, byte_level, choose, load_all
from tokenizers import models, pre_tokenizers

from megarl.data.thinking import ThinkingEnd
from megarl.data.tokenizer import Tokenizer, load_tokenizer

MARKER = "</think>"


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    return load_all(tmp_path_factory.mktemp("tokenizers"))


def test_the_markers_token_where_it_has_one(tokenizers: dict[str, Tokenizer]) -> None:
    for kind in ("sentencepiece", "hugging_face"):
        assert ThinkingEnd(tokenizers[kind]).token_id == tokenizers[kind].encode(MARKER)[0]
        assert ThinkingEnd(tokenizers[kind], "</thought>").token_id is None
    assert len(tokenizers["byte_level"].encode(MARKER)) > 1
    assert ThinkingEnd(tokenizers["byte_level"]).token_id is None


def test_a_learned_token_that_stands_for_the_marker_only_at_times(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(byte_level(tmp_path / "t", texts=[">4", ">4", MARKER, "a"]))
    assert len(tokenizer.encode(MARKER)) == 1 and len(tokenizer.encode("a" + MARKER + "a")) == 3
    assert tokenizer.decode(tokenizer.encode(MARKER + "4")[-1:]) == ">4"
    assert ThinkingEnd(tokenizer).token_id is None
    token_ids = [*tokenizer.encode("a" + MARKER), *tokenizer.encode("4")]
    assert ThinkingEnd(tokenizer).split(token_ids) == 2


def test_llama_spells_the_marker(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = choose(tokenizers, "llama")
    assert len(tokenizer.encode(MARKER)) > 1
    assert ThinkingEnd(tokenizer).token_id is None


def test_a_blank_that_the_tokenizer_puts_first_is_not_the_markers(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(sentencepiece_model(tmp_path / "t.model", user_defined_symbols=[MARKER]))
    ids = tokenizer.encode(MARKER)
    assert len(ids) == 2 and tokenizer.encode("the" + MARKER)[-1] == ids[-1]
    assert ThinkingEnd(tokenizer).token_id == ids[-1]
    assert ThinkingEnd(tokenizer).split(tokenizer.encode(f"the fox{MARKER}the dog")) == 1 + len(
        tokenizer.encode("the fox")
    )


def test_an_unknown_marker_has_no_token(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(hugging_face_folder(tmp_path / "t"))
    assert tokenizer.encode(MARKER) == [0]
    assert ThinkingEnd(tokenizer).token_id is None
    assert ThinkingEnd(tokenizer).split(tokenizer.encode("1 + 2")) == "thinking_missing"
    assert ThinkingEnd(tokenizer, "<think>").token_id == 7


@pytest.mark.parametrize(("silent", "marker"), [(True, MARKER), (False, " END")])
def test_the_token_of_all_unknown_texts_is_no_markers(tmp_path: Path, silent: bool, marker: str) -> None:
    """Neither where it counts as a control token, nor where it stands for the marker in every place."""
    inner = tokenizers_library.Tokenizer(
        models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2, "4": 3, ".": 4, ">": 5}, "<unk>")
    )
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    inner.add_special_tokens(["</s>", *["<unk>"] * silent])
    inner.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode(marker) == tokenizer.encode("a" + marker + "a")[-1:] == [0]
    assert tokenizer.decode([0]) == ("" if silent else "<unk>")
    assert ThinkingEnd(tokenizer, marker).token_id is None


def test_a_control_token_that_decodes_to_nothing(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(byte_level(tmp_path / "t", special=("<think>", MARKER)))
    (marker,) = tokenizer.encode(MARKER)
    assert tokenizer.decode([marker]) == ""
    end = ThinkingEnd(tokenizer)
    assert end.token_id == marker
    thinking, answer = tokenizer.encode("<think>a b"), tokenizer.encode(" 4")
    assert end.split([*thinking, marker, *answer, tokenizer.eos_token_id]) == len(thinking) + 1
    assert end.split([*tokenizer.encode("<think>\n"), marker, *answer]) == "thinking_empty"
    assert end.split([*thinking, marker, marker, *answer]) == "thinking_repeated"
    assert end.split(thinking) == "thinking_missing"


#: Thinking, what follows its marker, and what is found where that is not the end of the thinking.
SPLITS: list[tuple[str, str, str | None]] = [
    ("<think>a b = 3, ", " so 4", None),
    ("no opening", "\n\nso 4", None),
    ("é日本😀", "日本", None),
    ("<think>", "4", "thinking_empty"),
    ("<think>\n\n ", "4", "thinking_empty"),
    ("", "4", "thinking_empty"),
    (" \n", "4", "thinking_empty"),
    ("<think> <think>", " 4", "thinking_empty"),
    ("<think> so", " 4", None),
    ("<think>a", "", "thinking_unanswered"),
    ("<think>a", " \n\n", "thinking_unanswered"),
    ("", "", "thinking_empty"),
    ("a", " b</think>", "thinking_repeated"),
    ("</think>", " b", "thinking_repeated"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("raw", [False, True], ids=["words", "bytes"])
@pytest.mark.parametrize(("thinking", "answer", "reason"), SPLITS)
@pytest.mark.parametrize("ended", [False, True])
def test_thinking_and_answer(
    tokenizers: dict[str, Tokenizer], kind: str, raw: bool, thinking: str, answer: str, reason: str | None, ended: bool
) -> None:
    tokenizer = choose(tokenizers, kind)
    end = ThinkingEnd(tokenizer)

    def ids(text: str) -> list[int]:
        parts = text.split(MARKER)
        spelled = [byte_ids(tokenizer, kind, part) if raw else tokenizer.encode(part) for part in parts]
        marker = byte_ids(tokenizer, kind, MARKER) if raw else tokenizer.encode(MARKER)
        if end.token_id is not None:
            marker = [end.token_id]
        return [t for number, part in enumerate(spelled) for t in (marker * (number > 0) + part)]

    before = ids(thinking + MARKER)
    token_ids = [*before, *ids(answer), *[tokenizer.eos_token_id] * ended]
    assert end.split(token_ids) == (len(before) if reason is None else reason)


@pytest.mark.parametrize("kind", KINDS)
def test_responses_without_the_marker(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = choose(tokenizers, kind)
    for text in ("", "<think>so 4", "</thin k>", "</think"):
        assert ThinkingEnd(tokenizer).split([*tokenizer.encode(text), tokenizer.eos_token_id]) == "thinking_missing"


def test_a_marker_with_a_token_of_its_own_is_that_token_alone(tokenizers: dict[str, Tokenizer]) -> None:
    for kind in ("sentencepiece", "hugging_face"):
        tokenizer = tokenizers[kind]
        end, spelled = ThinkingEnd(tokenizer), byte_ids(tokenizer, kind, MARKER)
        assert end.token_id is not None and tokenizer.decode(spelled) == MARKER and end.token_id not in spelled
        assert end.split([*spelled, *tokenizer.encode("4")]) == "thinking_missing"
        assert end.split([*spelled, end.token_id, *tokenizer.encode("4")]) == len(spelled) + 1


def test_a_token_that_joins_the_markers_end_with_what_follows(tmp_path: Path) -> None:
    """Blanks may go with the marker; of an answer no character may."""
    tokenizer = load_tokenizer(byte_level(tmp_path / "t", texts=["a b", ">\n\n", ">4", "-5"]))
    end = ThinkingEnd(tokenizer)
    assert end.token_id is None
    (blank,), (joined,) = tokenizer.encode(">\n\n"), tokenizer.encode(">4")
    assert tokenizer.decode([joined]) == ">4"
    before = [*tokenizer.encode("a b"), *tokenizer.encode("</think")]
    assert end.split([*before, blank, *tokenizer.encode("-5")]) == len(before) + 1
    assert end.split([*before, blank]) == "thinking_unanswered"
    assert end.split([*before, joined, *tokenizer.encode("-5")]) == "thinking_missing"


def searched(tokenizer: Tokenizer, end: ThinkingEnd, token_ids: list[int]) -> int | str:
    """What `split` must find, by looking at the text of every prefix."""
    texts = [tokenizer.decode(token_ids[:count]) for count in range(len(token_ids) + 1)]
    if end.token_id is not None:
        number = token_ids.count(end.token_id)
        length = token_ids.index(end.token_id) + 1 if number else 0
        thinking = texts[max(length - 1, 0)]
    else:
        number = texts[-1].count(end.marker)
        thinking = texts[-1].split(end.marker)[0]
        until = thinking + end.marker
        length = next((count for count, text in enumerate(texts) if text.startswith(until)), 0)
        if number == 1 and texts[length].removeprefix(until).strip():
            return "thinking_missing"
    if number != 1:
        return "thinking_repeated" if number else "thinking_missing"
    if thinking.replace(end.marker.replace("</", "<"), "").strip() == "":
        return "thinking_empty"
    return length if tokenizer.decode(token_ids[length:]).strip() else "thinking_unanswered"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("marker", ["</think>", "</thought>", "Answer:", "◁/think▷"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_tokens_are_split_where_a_search_through_all_prefixes_splits(
    tokenizers: dict[str, Tokenizer], kind: str, marker: str, data: st.DataObject
) -> None:
    tokenizer = choose(tokenizers, kind)
    end = ThinkingEnd(tokenizer, marker)
    token_ids: list[int] = []
    for piece in data.draw(st.lists(st.sampled_from([marker, "é日本😀", "think>", "a ", "\n", "4"]), max_size=6)):
        token_ids += byte_ids(tokenizer, kind, piece) if data.draw(st.booleans()) else tokenizer.encode(piece)
        token_ids += data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=1))
    assert end.split(token_ids) == searched(tokenizer, end, token_ids)
