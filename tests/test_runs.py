"""Whole runs through the command line: launchers, the seams of the loop, evaluation, the real data of GSM8K."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import arithmetic_run
import numpy as np
import preloaded
import pytest
from browser_case import browser, look_at_all, opened, pixels_like
from parity import read_checkpoint
from ports import free_port

from megarl.cli.main import main
from megarl.health.run_lock import RunLock

ROOT = Path(__file__).resolve().parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"
#: The virtual environment's own commands: torchrun, mpirun.
COMMANDS = Path(sys.executable).parent
LIMIT = 400
#: The base run's reward: a function's, and half more for every answer, since none of them holds the right box.
TERMS = [
    {"name": "digits", "kind": f"{ROOT}/tests/arithmetic_run.py:digit_share", "time_limit": 60.0, "workers": 1},
    {"name": "box", "kind": "boxed", "weight": -0.5, "low": -1.0},
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model, problems, and run.yaml: GRPO on two processes."""
    folder = tmp_path_factory.mktemp("runs")
    arithmetic_run.write_inputs(folder)
    arithmetic_run.write_run(
        folder,
        name="base",
        steps=2,
        parallel={"processes": 2, "tensor": 2},
        rollout={"tensor": 2, "group_size": 4, "max_tokens": 12, "save": True, "kv_cache_gib": 0.02},
        batch={"prompts": 8, "tokens_per_microbatch": 256},
        evaluation={"path": "data/heldout.jsonl", "end": True},
        reward={"kind": "sum", "terms": TERMS},
    )
    code, _, errors = call(folder, "train", "run.yaml")
    assert code == 0, errors[-4000:]
    (folder / "log.txt").write_text(errors)
    return folder


def run(folder: Path, command: str, *arguments: str) -> str:
    """Run `megarl command` in `folder`, where it must succeed; returns its standard output."""
    code, output, errors = call(folder, command, *arguments)
    assert code == 0, errors[-4000:]
    return output


def call(folder: Path, command: str, *arguments: str) -> tuple[int | None, str, str]:
    """Run `megarl command` in `folder`; exit code, output and errors."""
    started = preloaded.megarl(folder, command, *arguments, apart=True)
    output, errors = started.communicate(LIMIT)
    return started.returncode, output, errors


def steps_of(folder: Path, name: str) -> list[dict[str, Any]]:
    """The training steps of a run's metrics.jsonl, without what depends on the machine."""
    lines = [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    machine = ("seconds", "peak_memory_bytes", "memory_bytes", "time_shares")
    return [{k: v for k, v in line.items() if k not in machine} for line in lines if "loss" in line]


def test_metrics_have_the_names_that_people_script_on(base: Path) -> None:
    lines = [json.loads(line) for line in (base / "runs/base/metrics.jsonl").read_text().splitlines()]
    names = {"step", "algorithm", "loss", "grad_norm", "reward_mean", "reward_std", "entropy", "response_length_mean"}
    names |= {
        "clip_share",
        "logprob_gap_mean",
        "logprob_gap_max",
        "logprob_k3",
        "tokens",
        "seconds",
        "peak_memory_bytes",
    }
    for line in lines[:2]:
        assert names <= line.keys()
        assert {"push", "generate", "score", "update"} <= line["seconds"].keys()
        assert line["peak_memory_bytes"] > 10_000_000
        assert line["staleness_mean"] == line["staleness_max"] == 0 and line["weight_push"]["pushes"] == 1
        assert 0 < line["time_shares"]["loss"] < 0.5
        assert 0 < line["logprob_gap_max"] < 1e-4
        assert 0 < line["reward_terms"]["digits"] < 1 and line["grad_norm"] > 0
        assert line["reward_terms"].keys() == {"digits", "box"} and line["reward_terms"]["box"] == -1.0
        assert line["reward_mean"] == pytest.approx(line["reward_terms"]["digits"] + 0.5)
    assert [line["step"] for line in lines] == [1, 2, 2]
    assert "accuracy" in lines[2] and lines[2]["evaluation_reward_terms"]["box"] == -1.0
    samples = [json.loads(line) for line in (base / "runs/base/samples.jsonl").read_text().splitlines()]
    sample = samples[0]
    assert len(samples) == 16 and "".join(piece["text"] for piece in sample["pieces"]) == sample["response"]
    for row in samples:
        assert sum(piece["tokens"] for piece in row["pieces"]) == row["length"]
        assert row["pieces"][0]["advantage"] == row["advantage"]
        # Of bytes that are no text the tokens' characters may not be known.
        assert all(
            len(piece.get("sizes", ids)) == len(ids) for piece in row["pieces"] for ids in [range(piece["tokens"])]
        )
    by_step = [sum(row["advantage"] for row in samples if row["step"] == step) for step in (1, 2)]
    assert by_step == pytest.approx([0, 0], abs=1e-3) and {row["advantage"] for row in samples} != {0}
    phases = [json.loads(line) for line in (base / "runs/base/phases.jsonl").read_text().splitlines()]
    assert [(line["step"], line["kind"]) for line in phases] == [(1, "step"), (2, "step"), (2, "evaluation")]
    for line, metrics in zip(phases, lines, strict=True):
        assert line["ranks"].keys() == {"0", "1"} and line["push_seconds"] <= line["slowest"]["push"]
        names = [name for name, _, _ in line["ranks"]["1"]["phases"]]
        assert set(names) == metrics["seconds"].keys()
    assert sample["reward"] == pytest.approx(sample["reward_terms"]["digits"] + 0.5)
    for file in ("config.yaml", "samples.jsonl", "phases.jsonl", "summary.json", "curves.png", "checkpoints/latest"):
        assert (base / "runs/base" / file).stat().st_size > 0
    assert (base / "runs/base/curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_leaves_a_page_that_a_browser_shows(base: Path) -> None:
    file = base / "runs/base/report.html"
    assert file.stat().st_size < 5e6
    with browser() as started, opened(started, file) as page:
        look_at_all(page)
        assert page.inner_text("h1") == "base" and page.inner_text("#found") == "16 of 24 samples"
        reward = page.locator(".charts .chart").first
        reward.scroll_into_view_if_needed()
        assert pixels_like(reward, "#2f7ed8") > 50
        ranks = page.locator("#times .chart").first
        assert ranks.get_attribute("aria-label").startswith("phases of every rank, step 2: push ")
        ranks.scroll_into_view_if_needed()
        assert pixels_like(ranks, "#d9600f") > 1_000
        page.click("#rows tbody tr")
        assert page.locator("#sample .value").count() == 1 and page.locator("#sample .token").count() >= 1


def test_the_log_has_a_line_a_step_each_warning_once_and_ends_with_what_there_is(base: Path) -> None:
    log = (base / "log.txt").read_text().splitlines()
    steps = [line for line in log if line.startswith("step ")]
    numbers = r"reward [\d.]+  loss \S+  grad \S+  gap \S+  length [\d.]+"
    assert re.fullmatch(rf"step 1/2  {numbers}  0:\d\d left  epoch 0.17  [^ ]+ s  \d+ tokens/s", steps[0])
    assert re.fullmatch(rf"step 2/2  {numbers}  epoch 0.33  [^ ]+ s  \d+ tokens/s", steps[1])
    assert re.match(r"step 2/2  accuracy [\d.]+ on 8 held-out problems  reward ", steps[2])
    assert len(steps) == 3
    # Of both ranks.
    warned = [line for line in log if "Warning" in line]
    assert len(warned) == len(set(warned))
    end = log[log.index(next(line for line in log if line.startswith("base: 2 step(s) done; "))) :]
    assert re.fullmatch(r"  accuracy    [\d.]+ \(step 2\) on 8 held-out problems", end[1])
    places = [Path(line.split()[1]) for line in end[3:]]
    assert all((base / place).exists() for place in places)
    names = {"summary.json", "report.html", "curves.png", "metrics.jsonl", "samples.jsonl", "evaluations"}
    assert names | {"step_000002"} <= {place.name for place in places}


def start_script(folder: Path, script: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Start a script of launch/ in `folder`."""
    path = os.pathsep.join([str(COMMANDS), os.environ["PATH"]])
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "PATH": path}
    command = ["bash", str(ROOT / "launch" / script), *arguments]
    return subprocess.Popen(command, cwd=folder, env=os.environ | environment, stderr=subprocess.PIPE, text=True)


def _without_a_reader(*arguments: str) -> None:
    """As `megarl ARGUMENTS 2>&1 | head`, whose reader is gone."""
    reader, writer = os.pipe()
    os.dup2(writer, 1)
    os.dup2(writer, 2)
    os.close(reader)
    sys.argv = ["megarl", *arguments]
    main()


def test_every_launcher_gives_the_same_run(base: Path) -> None:
    """MPI with four processes, of which the weights are compared to the bit, and torchrun with two, on one machine and
    on two that are the same one."""
    four = ("parallel.processes=4", "steps=1", "evaluation.end=false", "checkpoint.export_hf=true")
    # The one that the others are compared with has nobody who reads what it prints.
    forked = preloaded.Started(_without_a_reader, "train", "run.yaml", "name=forked", *four, folder=base)
    forked.communicate(LIMIT)
    assert forked.returncode == 0
    launch(base, [("mpirun.sh", "4", "train", "run.yaml", "name=mpirun", *four)], MPIRUN_OPTIONS="--oversubscribe")
    assert steps_of(base, "mpirun") == steps_of(base, "forked")
    expected, before = read_checkpoint(base / "runs/forked/hf"), read_checkpoint(base / "model")
    found = read_checkpoint(base / "runs/mpirun/hf")
    assert found.keys() == expected.keys()
    for tensor, values in expected.items():
        assert np.array_equal(found[tensor], values) and not np.array_equal(before[tensor], values), tensor

    # Each step's numbers follow from the weights that the one before left.
    launch(base, [("local.sh", "2", "train", "run.yaml", "name=torchrun", "evaluation.end=false")])
    assert steps_of(base, "torchrun") == steps_of(base, "base")
    hosts = ("multinode.sh", "localhost,localhost", "1", "train", "run.yaml", "name=multinode", "evaluation.end=false")
    launch(base, [hosts, hosts], MASTER_PORT=str(free_port()))
    assert steps_of(base, "multinode") == steps_of(base, "base")


def launch(folder: Path, commands: list[tuple[str, ...]], **environment: str) -> None:
    """Start the scripts, of as many hosts, and wait for their good end."""
    ranks = range(len(commands))
    started = [start_script(folder, *commands[rank], NODE_RANK=str(rank), **environment) for rank in ranks]
    for script in started:
        _, said = script.communicate(timeout=LIMIT)
        assert script.returncode == 0, said[-4000:]


@pytest.mark.parametrize(
    "command, said",
    [
        (["local.sh"], "launch/local.sh PROCESSES COMMAND CONFIG"),
        (["mpirun.sh", "2"], "launch/mpirun.sh PROCESSES COMMAND CONFIG"),
        (["multinode.sh", "a,b", "2"], "launch/multinode.sh HOST,HOST,... PROCESSES_PER_HOST COMMAND CONFIG"),
        (["multinode.sh", "a,b", "2", "check", "run.yaml"], "must be among a b. Fix: name it in the list, or set"),
    ],
)
def test_launchers_say_what_they_want(base: Path, command: list[str], said: str) -> None:
    script = start_script(base, *command)
    assert said in script.communicate()[1]
    assert script.returncode == 2


def test_replay_trains_as_the_run_that_made_the_rollouts(base: Path) -> None:
    run(base, "train", "run.yaml", "name=replayed", f"rollout.replay={base}/runs/base/rollouts", "evaluation.end=false")
    # Of saved tokens nobody says which weights made them: they are not held to the policy's.
    gap = ("logprob_gap_mean", "logprob_gap_max", "logprob_k3")
    made, again = steps_of(base, "base"), steps_of(base, "replayed")
    # Nor is there an engine to push weights to.
    engines = {"weight_push", "staleness_mean", "staleness_max"}
    assert all(engines <= line.keys() for line in made)
    assert again == [{k: v for k, v in line.items() if k not in engines} | dict.fromkeys(gap) for line in made]
    assert all(line[name] is not None for line in made for name in gap)


def test_generate_makes_the_first_steps_rollouts(base: Path) -> None:
    printed = run(base, "generate", "run.yaml", "name=generated", "steps=1")
    assert re.search(r"^samples +32$", printed, re.MULTILINE)
    made = sorted((base / "runs/generated/rollouts").glob("step_000001.*"))
    trained = sorted((base / "runs/base/rollouts").glob("step_000001.*"))
    assert [file.read_text() for file in made] == [file.read_text() for file in trained]


def test_benchmarks_measure_the_loop(base: Path) -> None:
    alone = ("parallel.processes=1", "parallel.tensor=1", "rollout.tensor=1", "evaluation.end=false", "steps=1")
    found = json.loads(run(base, "bench", "step", "run.yaml", *alone, "--json"))
    assert found["steps"] == 1 and {"push", "generate", "score", "update"} <= found["seconds"].keys()
    assert found["step_seconds"] > 0 and found["tokens_generated"] > 0
    found = json.loads(run(base, "bench", "rollout", "run.yaml", *alone, "--json"))
    assert found["requests"] == 32 and len(found["ratios"]) == 1
    assert min(found["ratio"], found["loop_tokens_per_second"], found["plain_tokens_per_second"]) > 0


def test_evaluate_repeats_the_runs_last_evaluation(base: Path) -> None:
    summary = json.loads((base / "runs/base/summary.json").read_text())
    printed = json.loads(run(base, "evaluate", "run.yaml", f"checkpoint={base}/runs/base", "--json"))
    assert printed["accuracy"] == summary["accuracy_after"]
    assert printed["evaluation_problems"] == 8
    answers = base / printed["answers"]
    assert answers.name == "evaluate_step_000002.jsonl"
    assert answers.read_bytes() == (base / "runs/base/evaluations/step_000002.jsonl").read_bytes()
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    problems = [json.loads(line) for line in (base / "data/heldout.jsonl").read_text().splitlines()]
    assert [(row["prompt_index"], row["sample_index"]) for row in rows] == [(index, 0) for index in range(8)]
    assert [row["answer"] for row in rows] == [problem["answer"] for problem in problems]
    assert sum(row["right"] for row in rows) / 8 == summary["accuracy_after"]
    digits = [arithmetic_run.digit_share(row["response"], "", "") for row in rows]
    assert [row["reward_terms"] for row in rows] == [{"digits": share, "box": -1.0} for share in digits]
    assert [row["reward"] for row in rows] == [pytest.approx(share + 0.5) for share in digits]


def test_a_finished_run_is_not_touched(base: Path) -> None:
    recorded = (base / "runs/base/metrics.jsonl").read_bytes()
    run(base, "generate", "run.yaml", "steps=1")
    code, _, errors = call(base, "train", "run.yaml")
    assert code == 2
    assert errors.splitlines()[-1] == (
        "megarl: name=base: already names a run, in runs/base, which a new one would mix with. "
        "Fix: continue it with resume=auto, choose another name, or move the folder away."
    )
    steps = json.loads((base / "runs/base/summary.json").read_text())["steps"]
    code, _, errors = call(base, "train", "run.yaml", "resume=auto")
    assert (code, errors.splitlines()[-1]) == (
        0,
        f"megarl: base is finished: {steps} of {steps} steps are made, see runs/base/summary.json; "
        "raise steps to go on",
    )
    assert (base / "runs/base/metrics.jsonl").read_bytes() == recorded


def test_a_folder_that_another_run_writes_is_left_alone(base: Path) -> None:
    """The holder is this process; its lock is that of a run on this machine."""
    lock = RunLock(base / "runs" / "held")
    lock.take(print)
    code, _, errors = call(base, "train", "run.yaml", "name=held")
    lock.release()
    assert code == 2
    last = errors.splitlines()[-1]
    assert re.fullmatch(
        rf"megarl: runs/held held by process {os.getpid()} on \S+ since [\d :-]+: two runs must not write one folder\. "
        r"Fix: wait for it or stop it, or give this run another name\.",
        last,
    )
    assert errors.count("two runs must not write") == 1
    assert not (base / "runs" / "held" / "metrics.jsonl").exists()


def test_a_run_whose_lock_was_taken_over_ends(base: Path) -> None:
    """As after a suspension: two runs must not write one folder. All ranks end, with one sentence."""
    started = preloaded.megarl(base, "train", "run.yaml", "name=lost", "steps=100000", apart=True)
    metrics, lock = base / "runs" / "lost" / "metrics.jsonl", base / "runs" / "lost" / "lock"
    deadline = time.monotonic() + LIMIT
    while not metrics.is_file():
        assert started.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    # As the other one does it: in one go.
    fresh = lock.with_name("fresh")
    fresh.write_text(json.dumps(json.loads(lock.read_text()) | {"host": "gpu07", "token": "other"}))
    fresh.replace(lock)
    _, errors = started.communicate(60)
    assert started.returncode == 2, errors[-4000:]
    assert re.search(r"^megarl: runs/lost held by process \d+ on gpu07 since .*: two runs must not write", errors, re.M)
    assert errors.count("two runs must not write") == 1 and "Traceback" not in errors
    assert lock.is_file()


def test_every_option_of_the_loop_at_once(base: Path) -> None:
    options = (
        "parallel.tensor=1",
        "parallel.pipeline=2",
        "rollout.tensor=1",
        "rollout.assignment=drawn",
        "batch.updates=2",
        "batch.packed=false",
        "algorithm.dynamic_sampling=true",
        "algorithm.max_generation_batches=3",
        "algorithm.advantage=reinforce_pp_baseline",
        "algorithm.kl_coefficient=0.01",
        "algorithm.kl_kind=k3+",
        "algorithm.importance_cap=2.0",
        "algorithm.importance_level=sequence",
        "algorithm.importance_mode=mask",
        "algorithm.rejection_bounds=[0.999,1.001]",
        "algorithm.rejection_level=sequence_mean",
        "algorithm.entropy_coefficient=0.01",
        "algorithm.dual_clip=3",
        "algorithm.overlong_buffer=4",
        "algorithm.ratio_level=sequence",
        "optimizer.warmup_steps=1",
        "optimizer.decay=linear",
        "steps=null",
        "epochs=0.25",
        "data.path=null",
        "data.sources=[{path: data/train.jsonl, name: easy, weight: 3}, {path: data/heldout.jsonl, weight: 1}]",
        "evaluation.path=null",
        "evaluation.sources=[{path: data/heldout.jsonl, name: a, max_rows: 2}, {path: data/train.jsonl, max_rows: 3}]",
    )
    code, _, errors = call(base, "train", "run.yaml", "name=options", *options)
    assert code == 0, errors[-4000:]
    assert "data: all 56 rows kept; starting" in " ".join(errors.split())
    first, second = steps_of(base, "options")
    assert first["groups_trained"] == 8
    assert first["lr"] == 1e-3 and 0 <= second["lr"] < 1e-3
    assert second["reference_kl"] > 0
    assert first["padding_share"] > 0
    assert abs(first["ratio_mean"] - 1) < 0.5
    assert "dual_clip_share" in first
    # Trainer and engine agree.
    assert first["importance_weight_mean"] == pytest.approx(1.0, abs=1e-2)
    assert first["importance_bound_share"] == first["rejected_share"] == 0
    # A quarter of 48 + 8 rows, at 8 a step, takes two steps; every fourth prompt is of the second source.
    drawn = first["groups"] + second["groups"]
    assert (first["epoch"], second["epoch"]) == (round(first["groups"] / 56, 6), round(drawn / 56, 6))
    assert first["answers_by_source"] == {"easy": 3 * first["groups"], "arithmetic": first["groups"]}
    assert first["reward_mean_by_source"].keys() == first["accuracy_by_source"].keys() == {"easy", "arithmetic"}
    parts = [first["reward_mean_by_source"][name] * first["answers_by_source"][name] for name in ("easy", "arithmetic")]
    assert sum(parts) / sum(first["answers_by_source"].values()) == pytest.approx(first["reward_mean"])
    lines = (base / "runs/options/metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["evaluation_answers_by_source"] == {"a": 2, "arithmetic": 3}
    assert "steps: 2\n" in (base / "runs/options/config.yaml").read_text()


def test_gsm8k_with_a_real_sentencepiece_tokenizer(tmp_path: Path) -> None:
    if not (SHARED_DATA / "gsm8k_train.jsonl").is_file():
        pytest.skip(f"the GSM8K file is not in {SHARED_DATA.name}/")
    model = tmp_path / "model"
    sizes = ["--family", "llama", "--hidden", "64", "--layers", "2", "--heads", "2", "--kv-heads", "2", "--ffn", "128"]
    command = [sys.executable, ROOT / "tools/make_tiny_model.py", *sizes, "--vocab-size", "32000", "--out", model]
    subprocess.run(command, check=True, capture_output=True)
    run(ROOT, "train", "configs/gsm8k_smoke.yaml", f"model.path={model}", f"runs_dir={tmp_path / 'runs'}")
    steps = steps_of(tmp_path, "gsm8k_smoke")
    assert len(steps) == 3
    assert all(0 < step["logprob_gap_max"] < 1e-4 for step in steps)
