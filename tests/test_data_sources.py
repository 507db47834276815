"""Several files as one data set, what metrics are told apart by, and the look at the data before a run."""

import json
from pathlib import Path
from typing import Any

import pytest
from config_case import write_case
from test_data_dataset import load, write_jsonl
from tokenizer_case import Characters

from megarl.config.data import DataSettings, each_source
from megarl.config.load import dump_config, load_config
from megarl.config.rewards import RewardSettings
from megarl.data.dataset import Part, evaluation_settings, load_prompts
from megarl.data.preview import data_refusals
from megarl.data.tokenizer import load_tokenizer
from megarl.errors import Refusal
from megarl.train.sources import by_source


def test_sources_lie_one_after_the_other(tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "first.jsonl", [{"q": "a", "a": "1"}, {"q": None, "a": "2"}, {"q": "c", "a": "3"}])
    (tmp_path / "second.csv").write_text("question,solution,data_source\nd,4,\ne,5,own\nf,6,\n")
    settings = DataSettings.model_validate(
        {
            "sources": [
                {"path": first, "name": "one", "weight": 1},
                {"path": str(tmp_path / "second.csv"), "prompt_column": "question", "answer_column": "solution",
                 "max_rows": 2, "weight": 3},
            ],
            "prompt_column": "q",
            "answer_column": "a",
        }
    )  # fmt: skip
    loaded = load_prompts(settings, Characters())
    assert [(p.index, p.text, p.answer, p.source) for p in loaded.prompts] == [
        (0, "a", "1", "one"),
        (2, "c", "3", "one"),
        (3, "d", "4", "second"),
        (4, "e", "5", "own"),
    ]
    assert loaded.parts == (Part(2, 1.0), Part(2, 3.0))
    assert (loaded.counters["rows"], loaded.counters["kept"], loaded.counters["no_prompt"]) == (5, 4, 1)
    assert loaded.source_names == ("one", "own", "second")
    missing = settings.sources[1].model_copy(update={"path": "none.csv"})
    with pytest.raises(Refusal, match=r"data\.sources\.1\.path=.*none\.csv: is not a file"):
        load_prompts(settings.model_copy(update={"sources": (settings.sources[0], missing)}), Characters())


def test_one_source_without_names_is_not_told_apart(tmp_path: Path) -> None:
    rows = [{"q": str(number), "a": "1", "data_source": f"s{number % 70}"} for number in range(70)]
    columns = {"prompt_column": "q", "answer_column": "a"}
    for count, names in ((1, 0), (2, 2), (64, 64), (65, 0)):
        loaded = load(write_jsonl(tmp_path / "r.jsonl", rows[:count]), **columns)
        assert len(loaded.source_names) == names
    with pytest.raises(Refusal, match=r"data\.source_column=kind: must be among the columns"):
        load(write_jsonl(tmp_path / "r.jsonl", rows), source_column="kind", **columns)


def test_numbers_by_source() -> None:
    answers = [("b", 1.0), ("a", 0.0), ("b", 0.0), ("b", None), ("c", None), ("a", 0.4)]
    assert by_source(answers, RewardSettings(low=0, high=1), prefix="cross_", detail="x_") == {
        "cross_accuracy_by_source": {"a": 0.0, "b": 0.5},
        "x_reward_mean_by_source": {"a": 0.2, "b": 0.5},
        "x_answers_by_source": {"a": 2, "b": 2, "c": 0},
    }


def test_the_evaluation_reads_its_own_files_or_those_of_the_training(run_file: Path) -> None:
    sources = (
        "data.sources=[{path: rows.jsonl, weight: 2, name: x, max_rows: 5, answer_column: b}, {path: o/n, weight: 1}]"
    )
    config = load_config(run_file, ["data.path=null", sources, "evaluation.rows=7"])
    assert load_config_again(config, run_file) == config
    held_out = each_source(evaluation_settings(config))
    assert [(s.settings.path, s.name, s.weight, s.settings.split, s.settings.max_rows) for s in held_out] == [
        ("rows.jsonl", "x", None, "test", 7),
        ("o/n", None, None, "test", 7),
    ]
    assert [s.settings.answer_column for s in held_out] == ["b", "answer"]
    config = load_config(run_file, ["evaluation.sources=[{path: a.csv, split: dev}, {path: b.csv}]"])
    held_out = each_source(evaluation_settings(config))
    assert [(s.settings.path, s.settings.split) for s in held_out] == [("a.csv", "dev"), ("b.csv", "test")]


def load_config_again(config: Any, folder: Path) -> Any:
    file = folder.parent / "again.yaml"
    file.write_text(dump_config(config))
    return load_config(file)


def test_a_list_of_paths_and_homes(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    text = run_file.read_text().replace("path: rows.jsonl", "path: [rows.jsonl, '~/b.csv']")
    run_file.write_text(text)
    config = load_config(
        run_file, ["runs_dir=~/runs", "model.path=~/m", "rollout.replay=~/r", "evaluation.path=~/e.csv"]
    )
    assert [source.path for source in config.data.sources] == ["rows.jsonl", "/home/ann/b.csv"]
    paths = (config.runs_dir, config.model.path, config.rollout.replay, config.evaluation.path)
    assert paths == ("/home/ann/runs", "/home/ann/m", "/home/ann/r", "/home/ann/e.csv")


TEMPLATE = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"


@pytest.mark.parametrize(
    ("rows", "template", "settings", "message"),
    [
        ('{"prompt": "x", "answer": "1"}', TEMPLATE, [], None),
        ('{"prompt": "x", "reply": "1"}', None, [], r"data\.answer_column=answer: must be among .*: prompt, reply"),
        ('{"prompt": null, "answer": "1"}', None, [], r"has no usable row \(rows 1, no_prompt 1\)"),
        ('{"prompt": "x", "answer": "1"}\n{', None, [], "line 2: cannot be read"),
        ('{"prompt": "x", "answer": "1"}', None, ["algorithm={name: sft}"], r"no usable row \(rows 1, no_solution 1\)"),
        (
            '{"prompt": "x", "answer": "1"}',
            "{{ raise_exception('never') }}",
            [],
            r"the chat template of .*model, at row 1 of rows\.jsonl: cannot render a prompt \(never\)",
        ),
        ('{"prompt": "x", "answer": "1"}', "{{ nothing.at.all }}", [], r"at row 1 .*'nothing' is undefined"),
        ('{"prompt": "x", "answer": "1"}', "{{ 1 // 0 }}", [], r"at row 1 .*division"),
        (
            '{"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "x"}], "answer": "1"}',
            TEMPLATE,
            [],
            r"at row 1 of rows\.jsonl: leaves out what a turn of role system says",
        ),
        ('{"prompt": "x", "answer": "1"}', TEMPLATE, ["evaluation.path=none.csv", "evaluation.end=true"],
         r"evaluation\.path=none\.csv: is not a file"),
        ('{"prompt": "x", "answer": "1"}', TEMPLATE,
         ["evaluation.sources=[{path: rows.jsonl, answer_column: key}]", "evaluation.end=true"],
         r"must be among the columns of rows\.jsonl: prompt, answer"),
        ('{"prompt": "x", "answer": "1"}', TEMPLATE, ["evaluation.path=rows.jsonl", "evaluation.end=true"], None),
    ],
)  # fmt: skip
def test_what_is_found_before_a_run_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: str, template: str | None, settings: list[str], message: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    file = write_case(tmp_path)
    (tmp_path / "rows.jsonl").write_text(rows + "\n")
    if template is not None:
        (tmp_path / "model" / "chat_template.jinja").write_text(template)
    refusals = list(data_refusals(load_config(file, settings), load_tokenizer("model")))
    if message is None:
        assert refusals == []
        return
    with pytest.raises(Refusal, match=message):
        raise refusals[0]
    assert len(refusals) == 1


def test_a_template_that_refuses_a_row_costs_that_row(tmp_path: Path) -> None:
    class Strict(Characters):
        def apply_chat(self, messages: Any) -> list[int]:
            from megarl.data.chat_template import checked

            def render() -> str:
                if messages[0]["role"] == "critic":
                    raise ValueError("roles\nare user and assistant")
                return "".join(message["content"] for message in messages if message["role"] == "user")

            return self.encode(checked(render, messages, "this test"))

    rows: list[dict[str, Any]] = [{"q": "kept", "a": "1"}]
    rows += [
        {"q": [{"role": role, "content": "s"}, {"role": "user", "content": "x"}], "a": "1"}
        for role in ("critic", "system")
    ]
    file = write_jsonl(tmp_path / "r.jsonl", rows)
    loaded = load_prompts(DataSettings(path=file, prompt_column="q", answer_column="a"), Strict())
    assert (loaded.counters["kept"], loaded.counters["template_refused"], loaded.counters["template_lost"]) == (1, 1, 1)
    assert loaded.first["template_refused"] == (
        f"row 2 of {file}: cannot render a prompt (roles are user and assistant)"
    )
    assert json.dumps(loaded.counters)
