"""From a prompt's cell to messages: all of its text, or none of it and the reason."""

from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from test_data_dataset import load, write_jsonl
from tokenizer_case import Characters

from megarl.data.messages import Unfit, messages_of
from megarl.errors import Refusal

USER = {"role": "user", "content": "1+1?"}
IMAGE = {"type": "image_url", "image_url": {"url": "x"}}


def text(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": one} for one in texts]


@pytest.mark.parametrize(
    ("cell", "wanted"),
    [
        ("1+1?", [USER]),
        ([USER], [USER]),
        ([{"role": "user", "content": text("1+1?")}], [USER]),
        ([{"role": "user", "content": ["1+1?"]}], [USER]),
        ([{"content": "1+1?"}], [USER]),
        (
            [{"role": "system", "content": text("be", "brief")}, USER],
            [{"role": "system", "content": "be\nbrief"}, USER],
        ),
        # Two turns of the system's, and a role that nobody knows: it is the template that may refuse them.
        ([{"role": "system", "content": "a"}, {"role": "system", "content": "b"}, USER], None),
        ([{"role": "critic", "content": "a"}, USER], None),
        # An empty turn of the system's says nothing.
        ([{"role": "system", "content": None}, USER], [USER]),
        ([{"role": "system", "content": ""}, USER], [USER]),
        # What tables fill up, and what goes on to the template.
        ([USER | {"tool_calls": None, "images": [], "name": "Ann"}], [USER | {"name": "Ann"}]),
        ({"role": ["user"], "content": ["1+1?"]}, [USER]),
        (USER, [USER]),
    ],
)
def test_all_of_the_text_is_kept(cell: Any, wanted: Any) -> None:
    assert messages_of(cell) == (cell if wanted is None else wanted)


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        (None, "no_prompt"),
        ("  ", "no_prompt"),
        ([], "no_prompt"),
        ([{"role": "system", "content": "alone"}], "no_prompt"),
        ([{"role": "user", "content": None}], "no_prompt"),
        ([{"role": "user", "content": [*text("what is this?"), IMAGE]}], "not_text"),
        ([{"role": "user", "content": [*text("what is this?"), {"type": "image"}]}], "not_text"),
        ([USER | {"images": ["a.png"]}], "not_text"),
        ([USER, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}], "not_text"),
        ([USER, {"role": "tool", "content": "3", "tool_call_id": "1"}], "not_text"),
        ([USER, {"role": "assistant", "content": ""}, USER], "bad_turns"),
        ([USER, "and then?"], "bad_turns"),
        ([[USER]], "bad_turns"),
        ([USER, None], "bad_turns"),
        ([{"from": "human", "value": "1+1?"}], "bad_turns"),
        ([USER | {"role": 3}], "bad_turns"),
        ([{"role": "user", "content": {"text": "1+1?"}}], "bad_turns"),
        ([{"role": "user", "content": [{"type": "text"}]}], "bad_turns"),
        ([{"role": "user", "content": [["1+1?"]]}], "bad_turns"),
        ({"role": ["user", "user"], "content": ["1+1?"]}, "bad_turns"),
        ("half a character \ud83d", "bad_turns"),
    ],
)
def test_what_is_no_text_is_not_cut_down_to_some(cell: Any, reason: str) -> None:
    with pytest.raises(Unfit) as caught:
        messages_of(cell)
    assert caught.value.reason == reason


def test_rows_are_counted_with_their_reasons(tmp_path: Path) -> None:
    prompts = [USER["content"], [USER | {"images": ["a"]}], [USER, "x"], "2+2?", "3+3?", "4+4?"]
    answers = ["2", "2", "2", ["4", ["5"]], {"value": "6"}, "8"]
    rows = [{"q": prompt, "a": answer} for prompt, answer in zip(prompts, answers, strict=True)]
    file = write_jsonl(tmp_path / "r.jsonl", rows)
    loaded = load(file, prompt_column="q", answer_column="a")
    assert [prompt.index for prompt in loaded.prompts] == [0, 5]
    assert {name: count for name, count in loaded.counters.items() if count} == {
        "rows": 6, "kept": 2, "not_text": 1, "bad_turns": 1, "bad_answer": 2,
    }  # fmt: skip
    assert loaded.sentence() == (
        "2 of 6 rows kept, skipped: "
        f"1 with pictures, sound, files or calls of tools in the prompt (the first is row 2 of {file}); "
        f"1 whose prompt is neither a text nor a list of whole messages (the first is row 3 of {file}); "
        f"2 whose answer or solution is no text (the first is row 4 of {file})"
    )
    assert loaded.skipped_share == pytest.approx(4 / 6)


def test_pictures_in_a_column_of_their_own_belong_to_the_question(tmp_path: Path) -> None:
    question = {"q": "What is in <image>?", "a": "1"}
    beside = [{"images": ["a.png"]}, {"image": {"path": "a.png"}}, {"audio": "a.wav"}, {"images": []}, {"image": None}]
    file = tmp_path / "r.parquet"
    rows = [question | dict.fromkeys(("images", "image", "audio")) | more for more in beside]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    for path in (file, write_jsonl(tmp_path / "r.jsonl", rows)):
        loaded = load(str(path), prompt_column="q", answer_column="a")
        assert (loaded.counters["not_text"], loaded.counters["kept"]) == (3, 2)
    # A column of that name that is read as text says nothing of pictures.
    rows = [{"image": "A picture, in words.", "a": "1"}]
    assert load(write_jsonl(tmp_path / "t.jsonl", rows), prompt_column="image", answer_column="a").counters["kept"] == 1


def test_a_source_of_which_nothing_is_left_is_refused(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "r.jsonl", [{"q": [USER | {"images": ["a"]}], "a": "1"}] * 3)
    with pytest.raises(Refusal, match=r"has no usable row \(rows 3, not_text 3\)"):
        load(file, prompt_column="q", answer_column="a")
    assert Characters.bos == 1
