"""Suites through the command line and its engines: a checkpoint and its exported folder, replicas, kills, a judge."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import arithmetic_run
import preloaded
import pytest
import yaml
from ports import free_port
from test_judge_run import judge

ROOT = Path(__file__).resolve().parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"
#: Two benchmarks, sampled and graded apart. The second's reward is a function's, which random answers earn.
SUITE: dict[str, Any] = {
    "data": {"max_prompt_tokens": 40, "answer_column": "answer"},
    "evaluation": {"samples": 4, "temperature": 1.0, "max_tokens": 24},
    "benchmarks": {
        "sums": {"data": {"path": "data/heldout.jsonl"}},
        "even": {
            "data": {"path": "data/train.jsonl"},
            "evaluation": {
                "rows": 12, "samples": 2, "max_tokens": 12,
                "reward": {"kind": "arithmetic_run:even_length", "workers": 1, "time_limit": 60.0},
            },
        },
    },
}  # fmt: skip
SMALL = ("rollout.kv_cache_gib=0.02", "rollout.chunk=4", "rollout.max_concurrent=8", "precision=fp32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, as a Hugging Face folder, as a Megatron checkpoint, and as what that is exported to."""
    found = tmp_path_factory.mktemp("suites")
    arithmetic_run.write_inputs(found)
    (found / "own.yaml").write_text(yaml.safe_dump(SUITE, sort_keys=False))
    for tool in (
        "convert_hf_to_megatron --hf model --out checkpoint",
        "convert_megatron_to_hf --megatron checkpoint --out exported",
    ):
        started = preloaded.Started(run_tool, *tool.split(), folder=found)
        output, _ = started.communicate(300)
        assert started.returncode == 0, output
    return found


def run_tool(name: str, *arguments: str) -> None:
    """`tools/NAME.py ARGUMENTS`."""
    sys.exit(importlib.import_module(name).main(list(arguments)))


def evaluated(folder: Path, *arguments: str) -> dict[str, Any]:
    """What `megarl evaluate ... --json` prints."""
    started = preloaded.megarl(folder, "evaluate", *arguments, *SMALL, "--json", apart=True)
    output, errors = started.communicate(400)
    assert started.returncode == 0, errors[-4000:]
    return json.loads(output)


def answers(folder: Path, benchmark: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{benchmark}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def exported(folder: Path) -> dict[str, Any]:
    """The scores of the exported folder, by one engine."""
    return evaluated(folder, "exported", "--suite", "own.yaml")["own"]


def test_what_is_left_of_an_evaluation(folder: Path, exported: dict[str, Any]) -> None:
    place = folder / "runs/exported/suites/exported.own"
    assert sorted(file.name for file in place.iterdir()) == ["even.jsonl", "results.json", "sums.jsonl"]
    assert json.loads((place / "results.json").read_text()) == exported
    assert (exported["suite"], exported["model"]) == ("own", "exported")
    sums, even = exported["benchmarks"]["sums"], exported["benchmarks"]["even"]
    assert (sums["problems"], sums["samples"], even["problems"], even["samples"]) == (8, 4, 12, 2)
    rows = answers(place, "even")
    assert [(row["prompt_index"], row["sample_index"]) for row in rows] == [(i, j) for i in range(12) for j in (0, 1)]
    assert [row["right"] for row in rows] == [len(row["response"]) % 2 == 0 for row in rows]
    assert even["score"] == pytest.approx(sum(row["right"] for row in rows) / 24) and 0.2 < even["score"] < 0.8
    assert even["pass"]["1"] == pytest.approx(even["score"]) and even["pass"]["2"] > even["score"]
    assert even["majority"] is None and sums["majority"] == 0.0
    assert even["interval"][0] < even["score"] < even["interval"][1]
    assert max(row["length"] for row in rows) <= 12 < max(row["length"] for row in answers(place, "sums")) <= 24
    assert all(row["why"] and "found" in row for row in answers(place, "sums"))
    assert exported["average"] == pytest.approx((sums["score"] + even["score"]) / 2)


def test_a_checkpoint_and_what_it_is_exported_to_have_the_same_scores(folder: Path, exported: dict[str, Any]) -> None:
    """The checkpoint on two replicas, which draw their work."""
    found = evaluated(
        folder, "checkpoint", "--suite", "own.yaml", "parallel.processes=2", "rollout.assignment=drawn",
        "runs_dir=pushed",
    )["own"]  # fmt: skip
    places = [folder / "pushed/evaluation/suites/checkpoint.own", folder / "runs/exported/suites/exported.own"]
    for name in ("sums", "even"):
        one, other = (answers(place, name) for place in places)
        assert one == other
        apart = {"made_for", "asked_pass_at"}
        assert {k: v for k, v in found["benchmarks"][name].items() if k not in apart} == {
            k: v for k, v in exported["benchmarks"][name].items() if k not in apart
        }


def test_a_killed_evaluation_goes_on_where_it_was(folder: Path, exported: dict[str, Any]) -> None:
    """Killed twice, in the midst of the first benchmark and of the second, on two replicas."""
    place = folder / "again/exported/suites/exported.own"
    arguments = ["evaluate", "exported", "--suite", "own.yaml", *SMALL, "parallel.processes=2", "runs_dir=again"]
    made = [0, 0]
    for number, name in enumerate(("sums", "even")):

        def in_the_midst(name: str = name, number: int = number) -> bool:
            files = list((place / "unfinished").glob(f"{name}.*.bin"))
            made[number] = sum(file.stat().st_size for file in files)
            return made[number] > 500

        arithmetic_run.kill_when(arithmetic_run.start(folder, *arguments), in_the_midst)
    assert min(made) > 500 and not (place / "even.jsonl").exists()
    first = (place / "sums.jsonl").stat().st_mtime_ns
    output = arithmetic_run.finish(arithmetic_run.start(folder, *arguments))
    left, before = map(int, re.findall(r"even: (\d+) answers to make, (\d+) were made before", output)[0])
    assert left + before == 24 and before > 0 and "sums:" not in output
    assert (place / "sums.jsonl").stat().st_mtime_ns == first
    found = json.loads((place / "results.json").read_text())
    assert found["benchmarks"] == exported["benchmarks"] and found["average"] == exported["average"]
    for name in ("sums", "even"):
        assert answers(place, name) == answers(folder / "runs/exported/suites/exported.own", name)
    assert not (place / "unfinished").exists()
    # A third time there is nothing left to do, and no engine.
    output = arithmetic_run.finish(arithmetic_run.start(folder, *arguments))
    assert "building" not in output and "answers and results.json: again/exported/suites/exported.own" in output


def test_a_second_turn_follows_the_models_own_answer(folder: Path) -> None:
    rows = [{"turns": [f"{i}+1=", f"and {i}+2="]} for i in range(3)]
    (folder / "talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"path": "talk.jsonl", "prompt_column": "turns.0", "extra_columns": ["turns.1"], "answer_column": None}
    port = free_port()
    reward = {"kind": "judge", "judge": {"url": f"http://127.0.0.1:{port}/v1", "model": "judge", "time_limit": 60.0}}
    suite = {
        "data": {"max_prompt_tokens": 40},
        "evaluation": {"samples": 2, "temperature": 1.0, "max_tokens": 10, "reward": reward},
        "benchmarks": {"talk": {"asks_again": True, "data": data}},
    }
    (folder / "judged.yaml").write_text(yaml.safe_dump(suite))
    server = judge(port)
    try:
        found = evaluated(folder, "model", "--suite", "judged.yaml")["judged"]["benchmarks"]["talk"]
    finally:
        server.kill()
        server.wait()
    kept = answers(folder / "runs/model/suites/model.judged", "talk")
    assert [(row["prompt_index"], row["sample_index"], row["turn"]) for row in kept] == [
        (i, j, turn) for i in range(3) for j in (0, 1) for turn in (1, 2)
    ]
    for one, two in zip(kept[::2], kept[1::2], strict=True):
        number = one["prompt_index"]
        assert one["prompt"] == f"{number}+1="
        said = one["response"] or " "
        assert two["prompt"] == f"User: {number}+1=\n\nAssistant: {said}\n\nUser: and {number}+2="
    assert (found["problems"], found["samples"], found["unscored"], found["pass"]) == (3, 2, 0, {})
    assert found["score"] == pytest.approx(sum(row["reward"] for row in kept) / 12) and 0 < found["score"] < 1


@pytest.mark.skipif(not SHARED_DATA.is_dir(), reason=f"{SHARED_DATA} is absent")
def test_the_whole_mathematical_suite_at_avg_4(folder: Path) -> None:
    """Its first problems, through two replicas."""
    if not (folder / "shared").exists():
        (folder / "shared").mkdir()
        (folder / "shared/data").symlink_to(SHARED_DATA)
        (folder / "shared/model").symlink_to(folder / "model")
    found = evaluated(
        folder / "shared", "model", "--suite", "math", "evaluation.samples=4", "evaluation.rows=2",
        "evaluation.max_tokens=16", "data.max_prompt_tokens=1200", "parallel.processes=2",
    )["math"]  # fmt: skip
    assert list(found["benchmarks"]) == ["gsm8k", "math500", "aime24", "aime25", "amc23", "minerva", "olympiad"]
    for one in found["benchmarks"].values():
        assert (one["problems"], one["samples"], one["skipped"], one["unscored"]) == (2, 4, 0, 0)
        assert one["pass"].keys() == {"1", "2", "4"} and one["majority"] == 0.0
