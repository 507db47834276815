"""Suites of benchmarks as files, what is refused before anything starts, and answers on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from megarl.cli.main import app
from megarl.config.load import read_with_base
from megarl.config.rewards import RewardSettings
from megarl.config.suites import Asked, asked, known_suites, read_suite, read_suites
from megarl.errors import Refusal
from megarl.evaluation import plan
from megarl.evaluation.answers import AnswersFile, Results
from megarl.evaluation.scores import of_suite, scores
from megarl.evaluation.target import read_target
from megarl.evaluation.votes import votes
from megarl.rewards.grader import Grader
from megarl.train import admission

ROOT = Path(__file__).resolve().parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"
JUDGE = ["evaluation.reward.judge.url=http://host:8000/v1", "evaluation.reward.judge.model=judge"]
#: A suite of one benchmark, in the folder of `run_file`.
SUITE: dict[str, Any] = {
    "evaluation": {"samples": 2, "temperature": 1.0, "max_tokens": 16},
    "data": {"max_prompt_tokens": 64},
    "benchmarks": {"sums": {"data": {"path": "rows.jsonl", "answer_column": "answer"}}},
}


def written(folder: Path, **changes: Any) -> Path:
    file = folder / "own.yaml"
    file.write_text(yaml.safe_dump(SUITE | changes))
    return file


def refused(*arguments: str) -> str:
    """The sentence with which `megarl evaluate` refuses, before any engine."""
    with pytest.raises(Refusal) as found:
        app(["evaluate", *arguments], standalone_mode=False)
    return str(found.value)


@pytest.mark.parametrize("name", known_suites())
def test_every_suite_is_one(name: str, run_file: Path) -> None:
    suite = read_suite(name)
    judged = JUDGE if name in ("judged", "start") else []
    for one in asked(suite, read_target(run_file).base, judged):
        assert one.suite == name and one.pass_at[0] == 1 and one.pass_at[-1] <= one.config.evaluation.samples
        assert one.config.evaluation.reward is not None and one.config.data.max_rows is None
    assert suite.about


def test_papers_settings_are_the_papers(run_file: Path) -> None:
    base = read_target(run_file).base
    nft = {one.benchmark: one.config for one in asked(read_suite("nft"), base, [])}
    assert {name: one.evaluation.samples for name, one in nft.items()} == {
        "aime24": 32, "math500": 1, "aime25": 32, "amc23": 32, "olympiad": 1, "minerva": 1
    }  # fmt: skip
    reward = nft["aime24"].evaluation.reward
    assert reward is not None
    assert (reward.kind, reward.last_characters, nft["aime24"].evaluation.top_p) == ("boxed", 100, 0.7)
    attnrl = {one.benchmark: one.config.evaluation for one in asked(read_suite("attnrl"), base, [])}
    assert {one.samples for one in attnrl.values()} == {32, 4}
    assert {(one.temperature, one.max_tokens) for one in attnrl.values()} == {(0.6, 32768)}


def test_problems_come_from_a_file_of_the_working_folder_else_from_the_hub(
    run_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = read_target(run_file).base
    (there,) = (one for one in asked(read_suite("math"), base, []) if one.benchmark == "gsm8k")
    assert (there.config.data.path, there.config.data.subset) == ("openai/gsm8k", "main")
    Path("data").mkdir()
    Path("data/gsm8k_test.jsonl").touch()
    (here,) = (one for one in asked(read_suite("math"), base, []) if one.benchmark == "gsm8k")
    assert (here.config.data.path, here.config.data.subset) == ("data/gsm8k_test.jsonl", None)
    assert here.config.data.instruction == there.config.data.instruction


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason=f"{SHARED_DATA} is absent")
def test_every_known_file_can_be_read(run_file: Path) -> None:
    Path("data").symlink_to(SHARED_DATA)
    long = ["data.max_prompt_tokens=200", "evaluation.max_tokens=16", "rollout.max_tokens=16"]
    for suite, more in (("math", []), ("start", JUDGE)):
        for one in asked(read_suite(suite), read_target(run_file).base, [*long, *more]):
            if one.benchmark != "arena_hard":
                assert one.config.data.path is not None and one.config.data.path.startswith("data/")
                assert list(admission.refusals(one.config, trains=False, evaluates=True)) == []


def test_what_the_command_says_wins_over_the_suite(run_file: Path) -> None:
    (one,) = asked(read_suite(str(written(run_file.parent))), read_target(run_file).base, ["evaluation.samples=8"])
    assert (one.config.evaluation.samples, one.pass_at) == (8, (1, 2, 4, 8))
    assert one.config.rollout.max_tokens == 1, "the engine's longest answer is the evaluation's"


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        (
            {"benchmarks": {"sums": {"data": {"path": "rows.jsonl", "answer_column": "truth"}}}},
            [],
            "data.answer_column=truth: must be among the columns of rows.jsonl: prompt, answer. "
            "Fix: set data.answer_column.",
        ),
        (
            {"benchmarks": {"sums": {"data": {"path": "rows.jsonl"}, "pass_at": [2]}}},
            [],
            "pass_at: is not a known key. Fix: use asks_again.",
        ),
        (
            {"pass_at": [4]},
            [],
            "pass@4 of sums: needs at least 4 samples of a problem, and evaluation.samples=2. "
            "Fix: set evaluation.samples=4, or ask for a smaller k.",
        ),
        (
            {},
            ["--pass-at", "1,3"],
            "pass@3 of sums: needs at least 3 samples of a problem, and evaluation.samples=2. "
            "Fix: set evaluation.samples=3, or ask for a smaller k.",
        ),
        ({}, ["--pass-at", "0"], "--pass-at 0: must be whole numbers from 1 on. Fix: write for example --pass-at 1,4."),
        (
            {"benchmarks": {"sums": None}},
            [],
            "benchmark sums of suite own: is none that is known (aime24, aime25, amc23, arena_hard, gsm8k, math500, "
            "minerva, mt_bench, olympiad), and names no file of its own. Fix: give sums.data.path and its columns.",
        ),
        (
            {"evaluation": {"samples": 2}},
            [],
            "evaluation.samples=2: needs evaluation.temperature > 0, since greedy answers are all the same. "
            "Fix: set evaluation.temperature, or samples to 1.",
        ),
        (
            {"evaluation": {"max_tokens": 250}},
            [],
            "data.max_prompt_tokens=64 + evaluation.max_tokens=250: must fit the model's 256 positions. "
            "Fix: make them 58 tokens shorter.",
        ),
        (
            {"data": {"answer_column": None, "max_prompt_tokens": 64}, "benchmarks": {"sums": {"data": {
                "path": "rows.jsonl"}}}},
            [],
            "data.answer_column=null: leaves no reference, which reward.kind=math compares with. "
            "Fix: name the column, or let a judge score.",
        ),
    ],
)  # fmt: skip
def test_a_suite_that_cannot_be_is_refused(
    changes: dict[str, Any], arguments: list[str], message: str, run_file: Path
) -> None:
    suite = written(run_file.parent, **changes)
    assert refused("model", "--suite", str(suite), *arguments) == message
    assert not Path("runs").exists()


def test_an_unknown_suite_is_told_the_known_ones(run_file: Path) -> None:
    known = ", ".join(known_suites())
    assert refused("model", "--suite", "maths") == (
        f"--suite maths: is neither the name of a suite ({known}) nor a file. "
        "Fix: use math, or the path of a YAML file like configs/suites/attnrl.yaml."
    )
    assert refused("model", "--suite", ",").startswith("--suite ',': names no suite.")
    assert [one.name for one in read_suites("nft,math,nft")] == ["nft", "math"]


def test_a_folder_that_is_no_model_is_refused(run_file: Path) -> None:
    Path("empty").mkdir()
    assert refused("empty", "--suite", "math").startswith("empty: is no model: neither a checkpoint or run folder")
    assert refused("model") == (
        "model: is a folder, which names no evaluation data. "
        f"Fix: add --suite NAME, one of {', '.join(known_suites())}."
    )
    assert refused("run.yaml", "--pass-at", "2").startswith("--pass-at 2: is for suites.")


def test_a_model_without_tokenizer_is_refused(run_file: Path) -> None:
    suite = str(written(run_file.parent))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        Path("model", file).unlink()
    assert refused("model", "--suite", suite) == (
        "tokenizer model: holds neither tokenizer.json nor tokenizer.model. "
        "Fix: copy the tokenizer's files there, or set model.tokenizer."
    )


def test_a_checkpoint_that_names_no_tokenizer_is_refused(run_file: Path) -> None:
    checkpoint = Path("runs/other/checkpoints/step_000003")
    checkpoint.mkdir(parents=True)
    (checkpoint / "progress.json").write_text(json.dumps({"step": 3, "optimizer": False, "files": {}, "model": {}}))
    assert refused(str(checkpoint), "--suite", "math") == (
        "runs/other/checkpoints/step_000003: has no tokenizer and no config.json beside its weights, and does not say "
        "where its model's are. Fix: say it with model.path=DIR, or evaluate the run's hf/ folder."
    )
    planned = plan.make(checkpoint, None, ["model.path=model"], read_suites(str(written(run_file.parent))), ())
    model = planned.works[0].asked.config.model
    assert (model.path, model.weights) == ("model", str(checkpoint))


def test_a_runs_file_needs_no_training_section(run_file: Path) -> None:
    Path("bare.yaml").write_text("model: {path: model}\n")
    bare, whole = read_target(Path("bare.yaml")), read_target(run_file)
    assert (bare.label, whole.label) == ("model", "model")
    assert "data" not in whole.base and str(whole.base["algorithm"]["name"]) == "grpo"
    assert str(bare.base["name"]) == "bare" and str(whole.base["name"]) == "case"
    assert read_with_base(run_file)["data"]


# Answers and scores


def an_asked(run_file: Path, **changes: Any) -> Asked:
    base = read_target(run_file).base
    (one,) = asked(read_suite(str(written(run_file.parent, **changes))), base, [])
    return one


def row(prompt: int, sample: int, reward: float | None, **more: Any) -> dict[str, Any]:
    right = None if reward is None else reward > 0.5
    whole = {"prompt_index": prompt, "sample_index": sample, "reward": reward, "right": right, "length": 4}
    return whole | {"finish_reason": "stop", "response": "x"} | more


def test_kept_answers_survive_a_torn_line_and_are_for_the_same_alone(tmp_path: Path) -> None:
    file = AnswersFile(tmp_path, "sums", "digest")
    assert file.kept() == []
    file.begin([])
    file.add([row(1, 0, 1.0), row(0, 1, 0.0)])
    with open(tmp_path / "sums.partial.jsonl", "a") as handle:
        handle.write('{"prompt_index": 0, "sam')
    assert [one["prompt_index"] for one in file.kept()] == [1, 0]
    assert AnswersFile(tmp_path, "sums", "other").kept() == []
    file.begin(file.kept())
    file.add([row(0, 0, 1.0)])
    assert len(file.kept()) == 3
    ordered = file.finish(file.kept())
    assert [(one["prompt_index"], one["sample_index"]) for one in ordered] == [(0, 0), (0, 1), (1, 0)]
    assert file.read() == ordered
    file.forget_partial()
    assert file.kept() == []


def test_scores_of_a_benchmark(run_file: Path) -> None:
    one = an_asked(run_file, evaluation={"samples": 2, "temperature": 1.0, "max_tokens": 16})
    rows = [row(0, 0, 1.0), row(0, 1, 0.0, length=8, finish_reason="length"), row(3, 0, 1.0), row(3, 1, None)]
    found = scores(one, rows, 5, [[(1, True), (1, False)], [(1, True)]], {"grader_timeout": 1})
    assert (found["problems"], found["samples"], found["skipped"], found["unscored"]) == (2, 2, 5, 1)
    assert found["score"] == pytest.approx(0.75) and found["majority"] == pytest.approx(0.75)
    # The second problem has one scored sample.
    assert found["pass"] == {"1": pytest.approx(0.75), "2": 1.0}
    assert (found["length_mean"], found["length_mean_wrong"], found["truncated_share"]) == (5.0, 8.0, 0.25)
    whole = of_suite({"sums": found, "none": scores(one, [row(0, 0, None)], 0, None, {})})
    assert whole["average"] == pytest.approx(0.75) and whole["benchmarks"]["none"]["score"] is None


def test_a_judges_scores_are_shares_of_its_range(run_file: Path) -> None:
    reward = {"kind": "judge", "low": -1.0, "judge": {"url": "http://x/v1", "model": "j"}}
    one = an_asked(run_file, evaluation={"max_tokens": 16, "reward": reward})
    found = scores(one, [row(0, 0, 0.0), row(1, 0, 1.0)], 0, None, {})
    assert (found["score"], found["pass"], found["majority"]) == (0.75, {}, None)


def test_equal_answers_vote_together() -> None:
    texts = [r"\frac12", "0.5", "1/2", "2", "2.0", "7", None]
    rows = [row(0, i, 0.0, found=text) for i, text in enumerate(texts)]
    rows += [row(1, 0, 1.0, found="9"), row(1, 1, 1.0, found="9.0"), row(1, 2, 0.0, found="8"), row(2, 0, 0.0)]
    with Grader(RewardSettings(kind="math", workers=1)) as grader:
        first, second, third = votes(rows, grader, 1.0)
    # Those of three votes are found first; no two others could be as many.
    assert max(first) == (3, False) and not any(group.right for group in first)
    assert second == [(2, True)] and third == []


def test_what_is_done_is_not_done_again(run_file: Path) -> None:
    suite = read_suite(str(written(run_file.parent)))

    def planned(*overrides: str, pass_at: tuple[int, ...] = ()) -> plan.Evaluation:
        return plan.make(Path("model"), None, overrides, [suite], pass_at)

    (work,) = planned().works
    assert work.folder == Path("runs/model/suites/model.own")
    work.folder.mkdir(parents=True)
    AnswersFile(work.folder, "sums", work.made_for).finish([])
    said = {"score": None, "made_for": work.made_for, "asked_pass_at": list(work.asked.pass_at)}
    Results(work.folder, "own", "model").write(of_suite({"sums": said}))
    assert planned().left == () and planned().results()["own"]["model"] == "model"
    assert planned("rollout.chunk=7", "parallel.tensor=2").left == ()
    assert len(planned("seed=5").left) == 1 and len(planned(pass_at=(1,)).left) == 1
    Path("model/model.safetensors").touch()
    assert len(planned().left) == 1, "other weights in the same place"
