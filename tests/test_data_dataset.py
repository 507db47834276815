"""Loading prompts: columns, filters and their counters, refusals, the real data files."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from tokenizer_case import Characters

from megarl.config.data import DataSettings
from megarl.data.dataset import LoadedPrompts, load_prompts
from megarl.errors import Refusal

ROOT = Path(__file__).resolve().parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not SHARED_DATA.is_dir(), reason=f"{SHARED_DATA} is absent")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import config

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(path: str, **settings: Any) -> LoadedPrompts:
    return load_prompts(DataSettings(path=path, **settings), Characters())


VERL_ROWS = [
    {
        "data_source": "toy",
        "prompt": [{"role": "user", "content": "1+1?"}],
        "reward_model": {"ground_truth": "2", "style": "rule"},
    },
    {
        "data_source": "toy",
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}],
        "reward_model": {"ground_truth": "4\n", "style": "rule"},
    },
]


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".parquet"])
def test_messages_and_nested_answers_of_every_file_kind(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"rows{ending}"
    if ending == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(VERL_ROWS), path)
    elif ending == ".json":
        path.write_text(json.dumps(VERL_ROWS))
    else:
        write_jsonl(path, VERL_ROWS)
    loaded = load(str(path))
    one, two = loaded.prompts
    assert Characters().decode(one.token_ids) == "[user]1+1?[assistant]"
    assert Characters().decode(two.token_ids) == "[system]Be brief.[user]2+2?[assistant]"
    assert (one.index, one.text, one.answer, one.source, one.solution) == (0, "1+1?", "2", "toy", None)
    assert (two.index, two.answer) == (1, "4")
    assert loaded.counters == {"rows": 2, "no_prompt": 0, "no_answer": 0, "too_long": 0, "no_solution": 0, "kept": 2}


def test_skips_are_counted_and_indices_keep_the_file_order(tmp_path: Path) -> None:
    rows = [
        {"q": "kept", "a": "1"},
        {"q": None, "a": "1"},
        {"q": "  ", "a": "1"},
        {"q": "none", "a": None},
        {"q": "blank", "a": " "},
        {"q": "x" * 50, "a": "1"},
        {"q": "also kept", "a": "2"},
    ]
    loaded = load(
        write_jsonl(tmp_path / "r.jsonl", rows),
        prompt_column="q",
        answer_column="a",
        template="{prompt}",
        max_prompt_tokens=20,
    )
    assert [prompt.index for prompt in loaded.prompts] == [0, 6]
    assert loaded.counters == {"rows": 7, "no_prompt": 2, "no_answer": 2, "too_long": 1, "no_solution": 0, "kept": 2}


def test_the_length_limit_counts_every_token_of_the_prompt(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "r.jsonl", [{"q": "12345", "a": "1"}])
    settings = DataSettings(path=path, prompt_column="q", answer_column="a", template="<{prompt}>")
    kept = load_prompts(settings, Characters(), max_prompt_tokens=8)
    assert kept.prompts[0].token_ids[0] == Characters.bos
    assert len(kept.prompts[0].token_ids) == 8
    with pytest.raises(Refusal, match="too_long 1"):
        load_prompts(settings, Characters(), max_prompt_tokens=7)


def test_answer_pattern_solution_and_missing_source(tmp_path: Path) -> None:
    rows = [{"question": "q", "answer": "2+3=5\n#### 1,005 "}, {"question": "q", "answer": "no mark"}]
    loaded = load(
        write_jsonl(tmp_path / "r.jsonl", rows),
        prompt_column="question",
        answer_column="answer",
        solution_column="answer",
        answer_pattern=r"####\s*(.+)",
    )
    assert loaded.counters["no_answer"] == 1
    assert loaded.prompts[0].answer == "1,005"
    assert loaded.prompts[0].solution == "2+3=5\n#### 1,005 "
    assert loaded.prompts[0].source == ""


def test_several_references_numbers_and_templates_with_braces(tmp_path: Path) -> None:
    rows = [{"q": "f{x}", "a": ["0.01\n", "0.02", "0.01"]}]
    loaded = load(
        write_jsonl(tmp_path / "r.jsonl", rows), prompt_column="q", answer_column="a", template=r"{prompt} in \boxed{}"
    )
    assert loaded.prompts[0].answer == "0.01"
    assert loaded.prompts[0].alternatives == ("0.02",)
    assert Characters().decode(loaded.prompts[0].token_ids) == r"f{x} in \boxed{}"
    numbers = write_jsonl(tmp_path / "n.jsonl", [{"q": "a", "a": 7}, {"q": "b", "a": None}, {"q": "c", "a": 8}])
    assert [prompt.answer for prompt in load(numbers, prompt_column="q", answer_column="a").prompts] == ["7", "8"]


def test_further_columns_are_carried_as_they_are(tmp_path: Path) -> None:
    rows = [{"q": "x", "a": "1", "level": 3, "meta": {"tags": ["b", "a"]}}, {"q": "y", "a": "2", "level": 4}]
    path, columns = write_jsonl(tmp_path / "r.jsonl", rows), {"prompt_column": "q", "answer_column": "a"}
    loaded = load(path, extra_columns=["level", "meta.tags"], **columns)
    assert [p.extra for p in loaded.prompts] == [
        {"level": 3, "meta.tags": ["b", "a"]},
        {"level": 4, "meta.tags": None},
    ]
    with pytest.raises(Refusal, match=r"data\.extra_columns=hint: must be among the columns .*: q, a, level, meta\."):
        load(path, extra_columns=["level", "hint"], **columns)


def test_system_message_and_row_bound(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "r.jsonl", [{"q": str(number), "a": "1"} for number in range(9)])
    loaded = load(path, prompt_column="q", answer_column="a", system="S", max_rows=3)
    assert loaded.counters["rows"] == 3
    assert Characters().decode(loaded.prompts[2].token_ids) == "[system]S[user]2[assistant]"


def test_rows_without_a_solution_are_skipped_where_one_is_needed(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "r.jsonl", [{"q": "a", "a": "1", "s": "so"}, {"q": "b", "a": "1", "s": None}])
    settings = DataSettings(path=path, prompt_column="q", answer_column="a", solution_column="s")
    assert load_prompts(settings, Characters()).counters["kept"] == 2
    needed = load_prompts(settings, Characters(), need_solution=True)
    assert (needed.counters["no_solution"], [prompt.solution for prompt in needed.prompts]) == (1, ["so"])


def test_a_rewritten_file_is_read_again(tmp_path: Path) -> None:
    for answer in ("1", "2"):
        path = write_jsonl(tmp_path / "r.jsonl", [{"q": "a", "a": answer}])
        assert load(path, prompt_column="q", answer_column="a").prompts[0].answer == answer


@pytest.mark.parametrize(
    ("content", "settings", "message"),
    [
        ("", {}, "is an empty file"),
        ("\n\n", {}, "cannot be read|no usable row"),
        ("{broken", {}, "cannot be read"),
        (
            '{"q": "x", "a": "1"}',
            {"prompt_column": "query"},
            r"data\.prompt_column=query: must be among the columns .*: q, a\.",
        ),
        ('{"q": "x", "a": {"b": "1"}}', {"answer_column": "a.c"}, r"must be among the fields of a: b\."),
        ('{"q": "x", "a": "1"}', {"answer_column": "a.c"}, "must be among the fields of a: none"),
        ('{"q": "x", "a": "1"}', {"solution_column": "s"}, r"data\.solution_column=s"),
        ('{"q": "x", "a": null}', {}, r"has no usable row \(rows 1, no_answer 1\)"),
        ('{"q": "x", "a": "1"}', {"answer_pattern": "("}, "must be a regular expression"),
        ('{"q": "x", "a": "1"}', {"answer_pattern": "x"}, "must have one group, not 0"),
        ('{"q": "x", "a": "1"}', {"template": "no place"}, "must contain {prompt}"),
    ],
)
def test_refusals(tmp_path: Path, content: str, settings: dict[str, Any], message: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(content)
    with pytest.raises(Refusal, match=message):
        load(str(path), **({"prompt_column": "q", "answer_column": "a"} | settings))


def test_missing_files_and_unknown_endings_are_refused_without_a_network(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="is not a file"):
        load(str(tmp_path / "none.jsonl"))
    (tmp_path / "table.xlsx").write_text("q,a\n")
    with pytest.raises(Refusal, match=r"must end in one of \.jsonl, \.json, \.parquet, \.csv, \.tsv\."):
        load(str(tmp_path / "table.xlsx"))
    with pytest.raises(Refusal, match="is a folder"):
        load(str(tmp_path))
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(Refusal, match="is not a file"):
        load(str(tmp_path / "folder.csv"))


def test_several_processes_read_one_file_at_once(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "r.jsonl", [{"prompt": f"{number}", "answer": "1"} for number in range(2000)])
    program = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from test_data_dataset import load\n"
        f"print(len(load({path!r}, answer_column='answer').prompts))\n"
        "print('torch' in sys.modules)\n"
    )
    environment = {"PATH": "/usr/bin:/bin", "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
        for _ in range(3)
    ]
    assert [process.communicate()[0].split() for process in processes] == [["2000", "False"]] * 3


GSM8K = {"prompt_column": "question", "answer_column": "answer", "answer_pattern": r"####\s*(.+)"}


@needs_data
@pytest.mark.parametrize(
    ("name", "settings", "rows", "skips", "first_answer"),
    [
        ("gsm8k_train.jsonl", GSM8K, 7473, {}, "72"),
        ("gsm8k_test.jsonl", GSM8K, 1319, {}, "18"),
        ("dapo_math_train.parquet", {"max_prompt_tokens": 10_000}, 24898, {"no_answer": 2}, "34"),
        ("math500.parquet", {"max_prompt_tokens": 10_000}, 500, {}, r"\left( 3, \frac{\pi}{2} \right)"),
        ("aime24.parquet", {}, 30, {}, "204"),
        ("aime25.parquet", {}, 30, {"too_long": 1}, "70"),
        ("amc23.parquet", {}, 40, {}, "27"),
        ("minerva.parquet", {"max_prompt_tokens": 10_000}, 272, {}, "9.6"),
        ("olympiad.parquet", {"max_prompt_tokens": 10_000}, 674, {}, "2"),
    ],
)
def test_real_files(name: str, settings: dict[str, Any], rows: int, skips: dict[str, int], first_answer: str) -> None:
    loaded = load(str(SHARED_DATA / name), **settings)
    expected = {"rows": rows, "no_prompt": 0, "no_answer": 0, "too_long": 0, "no_solution": 0} | skips
    assert loaded.counters == expected | {"kept": rows - sum(skips.values())}
    assert loaded.prompts[0].answer == first_answer


@needs_data
def test_a_file_without_references_says_which_columns_it_has() -> None:
    with pytest.raises(
        Refusal, match=r"reward_model\.ground_truth: must be among the columns .*question_id, category, turns"
    ):
        load(str(SHARED_DATA / "mt_bench.jsonl"), prompt_column="turns")
