"""Whole runs as jobs on a real Slurm: two nodes of two tasks, with vLLM generating and the policy learning.

Both nodes are this host, so what a shared file system must show them is only that it is one.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import arithmetic_run
import numpy as np
import pytest
import slurm_cluster
from parity import read_checkpoint
from slurm_cluster import Cluster

ROOT = Path(__file__).resolve().parent.parent
TWO_TASKS = ("--nodes=2", "--ntasks-per-node=1")

if lacking := slurm_cluster.missing():
    where = "Debian and Ubuntu: packages slurm-wlm and munge"
    pytest.skip(f"needs Slurm: this machine has no {', '.join(lacking)} ({where})", allow_module_level=True)

#: Seconds that a run may take; its processes share this machine's cores with others.
LIMIT = 300.0

#: Layout and engines span both nodes. Nothing is saved on the way but what a signal asks for.
RUN: dict[str, Any] = {
    "steps": 6,
    "parallel": {"tensor": 2},
    "rollout": {"tensor": 2, "group_size": 4, "max_tokens": 12, "kv_cache_gib": 0.02},
    "optimizer": {"lr": 1e-3, "warmup_steps": 3, "decay": "linear"},
    "checkpoint": {"export_hf": True},
}


@pytest.fixture(autouse=True)
def no_jobs_left(slurm: Cluster) -> Iterator[None]:
    """Also after a test that failed."""
    yield
    slurm.cancel_all()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slurm")
    arithmetic_run.write_inputs(folder)
    arithmetic_run.write_run(folder, **RUN)
    return folder


@pytest.fixture(scope="module")
def submit(slurm: Cluster, folder: Path) -> Callable[..., str]:
    """`sbatch OPTIONS slurm/TEMPLATE.sbatch ARGUMENTS` in the folder; returns the job's number."""

    def submit(options: tuple[str, ...], template: str, *arguments: str) -> str:
        script = str(ROOT / "slurm" / f"{template}.sbatch")
        paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        environment = {"MEGARL_HOME": str(ROOT), "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        return slurm.submit(*options, script, *arguments, cwd=folder, **environment)

    return submit


def start_and_end(slurm: Cluster, job: str) -> tuple[str, str]:
    fields = slurm.job(job)
    return fields["StartTime"], fields["EndTime"]


@pytest.fixture(scope="module")
def array(slurm: Cluster, submit: Callable[..., str], folder: Path) -> Path:
    """runs/ with the runs of an array, seeds 1 and 2, which ran side by side on both nodes."""
    job = submit((*TWO_TASKS, "--array=1-2"), "train", "run.yaml", "name=array")
    for task in (f"{job}_1", f"{job}_2"):
        slurm.wait(task, seconds=LIMIT)
    spans = [start_and_end(slurm, f"{job}_{index}") for index in (1, 2)]
    assert max(start for start, _ in spans) < min(end for _, end in spans), spans
    return folder / "runs"


def test_runs_of_an_array_do_not_collide(array: Path) -> None:
    """Each has its folder, its seed, and its two processes, which met each other."""
    summaries = [json.loads((array / f"array-seed{seed}" / "summary.json").read_text()) for seed in (1, 2)]
    assert [(one["steps"], one["processes"]) for one in summaries] == [(6, 2), (6, 2)]
    first, second = (read_checkpoint(array / f"array-seed{seed}" / "hf") for seed in (1, 2))
    assert not all(np.array_equal(first[tensor], second[tensor]) for tensor in first)


def test_a_run_that_was_asked_to_stop_ends_as_if_it_never_was(
    slurm: Cluster, submit: Callable[..., str], array: Path
) -> None:
    """The run of the array's first task, with a signal in its way: saved, put back into the queue, gone on with."""
    metrics = array / "broken" / "metrics.jsonl"
    job = submit(TWO_TASKS, "train", "run.yaml", "name=broken", "seed=1")
    slurm.wait_until(lambda: metrics.is_file() and metrics.read_text(), job, "a step is done", seconds=LIMIT)
    slurm.ask("scancel", "--signal=USR1", job)
    slurm.wait_until(lambda: slurm.job(job)["Restarts"] == "1", job, "the job is in the queue again", seconds=LIMIT)
    saved = int((array / "broken" / "checkpoints" / "latest").read_text().removeprefix("step_"))
    assert 1 <= saved < 6
    slurm.wait(job, seconds=LIMIT)
    assert f"continuing after step {saved}" in " ".join(slurm.log(job).split())
    expected, found = read_checkpoint(array / "array-seed1" / "hf"), read_checkpoint(array / "broken" / "hf")
    assert set(found) == set(expected)
    for tensor, values in expected.items():
        assert np.array_equal(found[tensor], values), tensor


def test_a_chain_of_training_evaluation_and_conversion(slurm: Cluster, folder: Path) -> None:
    """By one `megarl submit`: two nodes of two tasks, over which policy and engines spread; each job after the last."""
    evaluated = {"path": "data/heldout.jsonl", "end": True}
    # Learning at once, and converted by the last job alone.
    settings = ("name=chain", "steps=1", f"evaluation={json.dumps(evaluated)}", "checkpoint.export_hf=false")
    settings += ('optimizer={"lr": 0.001}',)
    asked = (
        "--nodes",
        "2",
        "--gpus-per-node",
        "0",
        "--tasks-per-node",
        "2",
        "--then",
        "evaluate --json",
        "--then",
        "convert",
    )
    command = (sys.executable, "-m", "megarl", "submit", "run.yaml", *settings, *asked)
    said = slurm.ask(*command, cwd=folder, PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    jobs = said.splitlines()[-1].removeprefix("cancel: scancel ").split()
    _, evaluate, convert = jobs
    slurm.wait(convert, seconds=2 * LIMIT)
    spans = [start_and_end(slurm, job) for job in jobs]
    assert spans == sorted(spans) and spans[0][1] <= spans[1][0] and spans[1][1] <= spans[2][0]
    run = folder / "runs" / "chain"
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["steps"], summary["processes"]) == (1, 4)
    (result,) = (json.loads(line) for line in slurm.log(evaluate).splitlines() if line.startswith("{"))
    assert result["accuracy"] == summary["accuracy_after"] and result["evaluation_problems"] == 8
    trained, before = read_checkpoint(run / "hf"), read_checkpoint(folder / "model")
    assert set(trained) == set(before)
    for tensor, values in before.items():
        assert not np.array_equal(trained[tensor], values), tensor
