"""Reading files: what is written in them, whatever the reader or the locale; broken ones by line."""

import datetime
import json
import os
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from test_data_dataset import ROOT, load

from megarl.errors import Refusal

COLUMNS = {"prompt_column": "q", "answer_column": "a"}
#: What a JSON file has for an answer, and the answer.
WRITTEN = {
    '"007"': "007",
    '"0.50"': "0.50",
    "0.50": "0.50",
    "7": "7",
    "7.0": "7.0",
    "12345678901234567891": "12345678901234567891",
    "1e5": "1e5",
    "-0": "-0",
    "true": "true",
    '"2024-01-02"': "2024-01-02",
    '"1e5"': "1e5",
    '"NaN"': "NaN",
    '"null"': "null",
    '"a\u2028b"': "a\u2028b",
    "Infinity": "Infinity",
}


def answers(path: Path, **settings: Any) -> list[str]:
    return [prompt.answer for prompt in load(str(path), **(COLUMNS | settings)).prompts]


def test_numbers_of_further_columns_are_numbers_where_there_is_one(tmp_path: Path) -> None:
    cells, file = ["7", "0.50", "1e999", "9" * 5000, "-Infinity"], tmp_path / "r.jsonl"
    file.write_text("\n".join(f'{{"q": "x", "a": 1, "n": {cell}}}' for cell in cells))
    found = [prompt.extra["n"] for prompt in load(str(file), extra_columns=["n"], **COLUMNS).prompts]
    assert found == [7, 0.5, "1e999", "9" * 5000, float("-inf")]


@pytest.mark.parametrize("form", ["lines.jsonl", "lines.json", "array.json", "marked.jsonl"])
def test_json_answers_are_what_is_written(tmp_path: Path, form: str) -> None:
    rows = [f'{{"q": "x", "a": {cell}}}' for cell in [*WRITTEN, "null", "NaN"]]
    file = tmp_path / form
    text = f"[{', '.join(rows)}]" if form.startswith("array") else "\n".join(rows) + "\n"
    file.write_bytes((b"\xef\xbb\xbf" if form.startswith("marked") else b"") + text.encode())
    assert answers(file) == list(WRITTEN.values())
    assert load(str(file), **COLUMNS).counters["no_answer"] == 2


@pytest.mark.parametrize(("ending", "between"), [("csv", ","), ("tsv", "\t")])
def test_cells_of_a_csv_are_texts(tmp_path: Path, ending: str, between: str) -> None:
    cells = ["007", "0.50", "12345678901234567891", "NaN", "NA", "null", "True", "1e5", '"1,005\nor\t1005"', ""]
    lines = [between.join(("q", "reward_model.ground_truth")), *(between.join(("é?", cell)) for cell in cells)]
    file = tmp_path / f"rows.{ending}"
    file.write_bytes("\ufeff".encode() + "\r\n".join(lines).encode())
    loaded = load(str(file), prompt_column="q")
    assert [p.answer for p in loaded.prompts] == [*cells[:-2], "1,005\nor\t1005"]
    assert loaded.counters["no_answer"] == 1
    assert loaded.prompts[0].text == "é?"


def test_a_typed_table_keeps_its_types(tmp_path: Path) -> None:
    columns = {
        "007": pyarrow.array(["007"]),
        "12345678901234567891": pyarrow.array([12345678901234567891], pyarrow.uint64()),
        "0.5": pyarrow.array([0.5]),
        # Tables of pandas have 7.0 for 7 beside a missing value.
        "7": pyarrow.array([7.0]),
        "1e+300": pyarrow.array([1e300]),
        "0.50": pyarrow.array([Decimal("0.50")]),
        "2024-01-02": pyarrow.array([datetime.date(2024, 1, 2)]),
        "true": pyarrow.array([True]),
        "bytes": pyarrow.array([b"bytes"]),
    }
    table = pyarrow.table({"q": ["x"], **{f"c{i}": cell for i, cell in enumerate(columns.values())}})
    file = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(table, file)
    for number, wanted in enumerate(columns):
        assert answers(file, answer_column=f"c{number}") == [wanted]
    missing = pyarrow.table({"q": ["x"] * 3, "a": [1.0, float("nan"), None]})
    pyarrow.parquet.write_table(missing, file)
    assert answers(file) == ["1"]


def test_further_columns_have_numbers_to_compute_with(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"q": "x", "a": "1", "m": {"n": 0.50, "big": 12345678901234567891, "l": [1, true, null]}}\n')
    loaded = load(str(file), extra_columns=["m"], **COLUMNS)
    assert loaded.prompts[0].extra == {"m": {"n": 0.5, "big": 12345678901234567891, "l": [1, True, None]}}


def parquet(cut: int) -> bytes:
    stream = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"q": ["x"] * 100, "a": ["1"] * 100}), stream)
    return stream.getvalue().to_pybytes()[:cut]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            '{"q": "é", "a": "1"}\n{"q": "é", "a": "1"}\n'.encode("latin-1"),
            r"line 1: .*byte 0xe9 is not UTF-8",
        ),
        ("a.jsonl", '{"q": "é", "a": "1"}'.encode("utf-16"), r"line 1: .*byte 0xff is not UTF-8"),
        ("a.csv", "q,a\nx,1\né,2\n".encode("latin-1"), r"line 3: .*is not UTF-8"),
        ("a.jsonl", b'{"q": "x", "a": "1"}\n{"q": "x", "a"', r"line 2: cannot be read \(Expecting"),
        ("a.jsonl", b'{"q": "x", "a": "1"}\n\n[1]\n', r"line 3: .*no object of columns"),
        ("a.jsonl", b'{"q": "x", "a": "1", "a": "2"}\n', r"line 1: .*key 'a' is given twice"),
        ("a.json", b'[{"q": "x", "a": "1"},\n{"q": "x" "a": "1"}]', r"line 2: cannot be read \(Expecting"),
        ("a.json", b'[{"q": "x", "a": "1"}, 3]', r"row 2: .*no object of columns"),
        ("a.jsonl", b"[" * 100_000, "nested too deeply"),
        ("a.csv", b"q,a\nx,1\ny,2,3\n", r"line 3: .*3 cells under the 2 columns"),
        ("a.csv", b'q,a\nx,"1\ny,2\n', r"line 3: .*unexpected end of data"),
        ("a.csv", b"q,a,a\nx,1,2\n", r"line 1: .*key 'a' is given twice"),
        ("a.csv", b"q,a\n", r"has no usable row \(rows 0\)"),
        ("a.csv", b"question,answer\nx,1\n", r"prompt_column=q: must be among the columns of .*: question, answer\."),
        ("a.parquet", b"PAR1 and more", "cannot be read"),
        ("a.parquet", parquet(-20), "cannot be read"),
    ],
)
def test_broken_files_in_one_sentence(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(Refusal, match=message) as caught:
        load(str(tmp_path / name), **COLUMNS)
    assert "\n" not in str(caught.value)


def test_one_row_over_several_lines(tmp_path: Path) -> None:
    file = tmp_path / "row.json"
    file.write_text(json.dumps({"q": "x", "a": 1.50}, indent=2))
    assert answers(file) == ["1.5"]


def test_the_locale_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"q": "é日", "a": "½"}\n', encoding="utf-8")
    (tmp_path / "chat_template.jinja").write_text("é {{ messages[0].content }}", encoding="utf-8")
    program = (
        "from megarl.data.chat_template import find_template\n"
        "from pathlib import Path\n"
        "from test_data_dataset import load\n"
        "prompt = load('rows.jsonl', prompt_column='q', answer_column='a').prompts[0]\n"
        "print(ascii((prompt.text, prompt.answer, find_template(Path())[:1])))\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "LC_ALL": "C", "PYTHONUTF8": "0"}
    environment["PYTHONCOERCECLOCALE"] = "0"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=True)
    assert done.stdout == ascii(("é日", "½", "é")) + "\n"
