"""The trained tokenizer: exact round trips, and the same ids from sentencepiece and from Hugging Face."""

import importlib
import json
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megarl.data.tokenizer import Tokenizer, load_tokenizer, response_ids

TOOLS = Path(__file__).resolve().parents[1] / "tools"
sys.path.insert(0, str(TOOLS))

make_arithmetic = importlib.import_module("make_arithmetic")
train_tokenizer = importlib.import_module("train_tokenizer")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer trained on arithmetic and on some prose, so that it has words too."""
    path = tmp_path_factory.mktemp("tokenizer")
    make_arithmetic.main(["--out", str(path), "--train", "500", "--heldout", "10"])
    prose = "".join(tool.read_text() for tool in sorted(TOOLS.glob("*.py")))
    (path / "prose.txt").write_text(prose)
    arguments = ["--input", str(path / "train.jsonl"), str(path / "prose.txt"), "--vocab-size", "600"]
    assert train_tokenizer.main([*arguments, "--markers", "Answer:", "--out", str(path / "out")]) == 0
    return path / "out"


@pytest.fixture(scope="module")
def pair(folder: Path) -> tuple[Tokenizer, Tokenizer]:
    return load_tokenizer(folder), load_tokenizer(folder / "tokenizer.model")


def test_both_loaders_agree_on_the_special_ids(pair: tuple[Tokenizer, Tokenizer]) -> None:
    facts = [(one.vocab_size, one.eos_token_id, one.pad_token_id, one.bos) for one in pair]
    assert facts[0] == facts[1]
    assert facts[0] == (600, 1, 2, None)


BLANKS = (" ", "  ", "\n\n\n", "\t", "\r", "\x00")
LOOKALIKES = ("<", ">", "<0x41>", "0x41>", "<0", ">>", "x", "think", "\\boxed", "{", "Answer:")
WORDS = ("the ", "print", "return", "12", "=", "+7", "é", "日本", "😀")
FRAGMENTS = st.sampled_from([*train_tokenizer.MARKERS, *BLANKS, *LOOKALIKES, *WORDS])
TEXTS = st.lists(st.one_of(FRAGMENTS, st.text(st.characters(exclude_categories=["Cs"]), max_size=4)), max_size=15)


@settings(max_examples=400, deadline=None)
@given(TEXTS)
def test_both_give_the_same_ids_and_the_text_comes_back(pair: tuple[Tokenizer, Tokenizer], parts: list[str]) -> None:
    hugging_face, sentencepiece = pair
    text = "".join(parts)
    ids = hugging_face.encode(text)
    assert ids == sentencepiece.encode(text)
    # sentencepiece writes blanks as U+2581, so that character alone cannot come back.
    expected = text.replace("\u2581", " ")
    assert hugging_face.decode(ids) == expected
    assert sentencepiece.decode(ids) == expected


@pytest.mark.parametrize("marker", [*train_tokenizer.MARKERS, "Answer:"])
def test_markers_are_one_token_wherever_they_stand(pair: tuple[Tokenizer, Tokenizer], marker: str) -> None:
    for tokenizer in pair:
        (marker_id,) = tokenizer.encode(marker)
        for before, after in (("", "1"), ("1", ""), ("a ", " b"), ("</think>", "<think>"), ("=7", "12")):
            assert tokenizer.encode(before + marker + after) == [
                *tokenizer.encode(before),
                marker_id,
                *tokenizer.encode(after),
            ]


def test_digits_stand_alone(pair: tuple[Tokenizer, Tokenizer]) -> None:
    for tokenizer in pair:
        assert len(tokenizer.encode("1234567890")) == 10
        assert tokenizer.encode("42")[0] == tokenizer.encode("4")[0]


def test_solutions_are_short_and_control_ids_are_silent(pair: tuple[Tokenizer, Tokenizer], folder: Path) -> None:
    rows = [json.loads(line) for line in (folder.parent / "train.jsonl").read_text().splitlines()]
    for tokenizer in pair:
        for row in rows:
            ids = response_ids(tokenizer, row["solution"])
            assert len(ids) <= 48
            assert tokenizer.decode([*ids, tokenizer.pad_token_id, tokenizer.vocab_size + 5]) == row["solution"]


def test_the_chat_template_puts_the_question_on_its_own_line(pair: tuple[Tokenizer, Tokenizer]) -> None:
    hugging_face, _ = pair
    ids = hugging_face.apply_chat([{"role": "user", "content": "1+2="}])
    assert ids == hugging_face.encode("1+2=\n")


def test_bad_input_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "some.txt").write_text("abc def\n" * 10)
    (tmp_path / "empty.txt").write_text("\n")
    for arguments, message in (
        (["--input", str(tmp_path / "some.txt"), "--vocab-size", "100"], "Vocabulary size"),
        (["--input", str(tmp_path / "empty.txt")], "empty.txt holds no text"),
        (["--input", str(tmp_path / "none.txt")], "No such file"),
        (["--input", str(tmp_path / "some.txt"), "--markers", "a b"], "blanks"),
    ):
        assert train_tokenizer.main([*arguments, "--out", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
