"""tools/make_paper_data.py: from rows as the hub's data sets have them to files that runs read."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
make_paper_data = importlib.import_module("make_paper_data")

FRAME = "Solve it. The last line is Answer: $Answer.\n\n{}\n\nRemember the last line."


def made(tmp_path: Path, name: str, *rows: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that the recipe `name` makes of a data set's rows, by the file that it writes."""
    source = tmp_path / "source.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert make_paper_data.main([name, "--out", str(tmp_path / "data"), "--source", str(source)]) == 0
    (path,) = (tmp_path / "data").iterdir()
    import datasets

    kind = "parquet" if path.suffix == ".parquet" else "json"
    return list(datasets.load_dataset(kind, data_files=str(path), split="train"))  # type: ignore[arg-type]


def test_dapo_has_each_question_once_without_its_frame(tmp_path: Path) -> None:
    def row(question: str, answer: str) -> dict[str, Any]:
        prompt = [{"role": "user", "content": FRAME.format(question)}]
        return {
            "prompt": prompt,
            "reward_model": {"ground_truth": answer, "style": "rule"},
            "extra_info": {"index": "a"},
        }

    rows = made(tmp_path, "dapo_math_17k", row("Two\n\nparagraphs?", "34"), row("Other?", "5"), row("Other?", "5"))
    assert [row["prompt"][0]["content"] for row in rows] == [
        f"{question}{make_paper_data.BOXED}" for question in ("Two\n\nparagraphs?", "Other?")
    ]
    assert [row["reward_model"]["ground_truth"] for row in rows] == ["34", "5"]


def test_math_has_the_last_box_as_its_reference_and_the_levels_that_are_wanted(tmp_path: Path) -> None:
    def row(level: int, solution: str) -> dict[str, Any]:
        return {"problem": f"of {level}", "level": f"Level {level}", "type": "Algebra", "solution": solution}

    given = [row(1, r"\boxed{1}"), row(3, r"\boxed{2} so \boxed{\frac{1}{2}}"), row(5, "none"), row(5, r"\boxed{7}")]
    rows = made(tmp_path, "math_level3to5", *given)
    assert [(row["prompt"], row["answer"]) for row in rows] == [("of 3", r"\frac{1}{2}"), ("of 5", "7")]
    assert rows[0]["solution"] == given[1]["solution"]


def test_a_traces_file_has_whole_responses(tmp_path: Path) -> None:
    row = {"question": "q", "final_answer": "1", "r1_solution_1": "<think>t</think> 1"}
    assert made(tmp_path, "deepmath", row, row | {"r1_solution_1": ""}) == [
        {"prompt": "q", "answer": "1", "solution": "<think>t</think> 1", "data_source": "deepmath"}
    ]


def test_a_data_set_of_other_columns_is_named_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "source.jsonl").write_text('{"text": "a"}\n')
    code = make_paper_data.main(
        ["deepscaler", "--out", str(tmp_path / "data"), "--source", str(tmp_path / "source.jsonl")]
    )
    assert code == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "make_paper_data: deepscaler: the data set has no column 'problem'"
    assert not (tmp_path / "data").exists()
