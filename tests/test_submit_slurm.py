"""`megarl submit` on a real Slurm: what it accepts, what it would refuse, and the jobs that come of it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from slurm_cluster import Cluster
from test_cli import ROOT
from test_submit import CPU, case

__all__ = ["case"]

RECIPE = ("configs/grpo_qwen2.5_32b_16k.yaml", "--nodes", "16")

#: In the place of python, where the job starts megarl and tools: says how it was called, and fails where it is told to.
STAND_IN = """\
#!/usr/bin/env bash
echo "rank $SLURM_PROCID of $SLURM_NTASKS: $*"
[[ $* != *seed=7* || $* != *train* ]]
"""


@pytest.fixture
def on_slurm(slurm: Cluster, case: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `megarl submit` in the case's folder, or another, on the cluster; jobs find the stand-in for python."""
    program = case / "bin" / "python"
    program.parent.mkdir()
    program.write_text(STAND_IN)
    program.chmod(0o755)
    # A repository without an environment of its own, whose programs would come first.
    home = case / "home"
    home.mkdir()
    for name in ("slurm", "launch"):
        (home / name).symlink_to(ROOT / name)

    def submit(*arguments: str, cwd: Path = case, **variables: str) -> subprocess.CompletedProcess[str]:
        path = f"{program.parent}{os.pathsep}{slurm.environment['PATH']}"
        ours = {"PYTHONPATH": str(ROOT), "MEGARL_HOME": str(home), "PATH": path}
        environment = slurm.environment | variables | ours
        command = [sys.executable, "-m", "megarl", "submit", *arguments]
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)

    return submit


Submit = Callable[..., subprocess.CompletedProcess[str]]


def test_slurm_accepts_the_script_of_a_32b_recipe_on_16_nodes(on_slurm: Submit, slurm: Cluster) -> None:
    result = on_slurm(*RECIPE, "--partition", "gpu", "--time", "1-0", "--dry-run", cwd=ROOT)
    assert result.returncode == 0, result.stderr
    verdict = " to start at "
    asked, building, fits, nothing = result.stderr.splitlines()[-4:]
    assert asked.startswith("megarl: sbatch --test-only, train: Job ") and verdict in asked
    assert asked.endswith(" using 1536 processors on nodes g[01-16] in partition gpu")
    assert building == "megarl: building the shards of 4 pipeline stage(s), without memory"
    assert fits.startswith("megarl: fits: the tightest is train on pipeline stage ")
    assert nothing == "megarl: nothing was submitted or written"
    script = set(result.stdout.splitlines())
    assert {"#SBATCH --nodes=16", "#SBATCH --gpus-per-node=8", "#SBATCH --ntasks-per-node=8"} < script
    # A GPU's share of a node's cores.
    assert "#SBATCH --cpus-per-task=12" in script
    again = subprocess.run(
        ["sbatch", "--test-only"],
        input=result.stdout,
        env=slurm.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert again.returncode == 0 and verdict in again.stderr, again.stderr


def test_slurm_accepts_the_jobs_of_a_row_each_for_its_own_tool(slurm: Cluster, tmp_path: Path) -> None:
    environment = slurm.environment | {"PYTHONPATH": str(ROOT)}
    options = ("--submit", "--dry-run", "--partition", "gpu", "--time", "1-0")
    command = [sys.executable, "-m", "megarl", "reproduce", "bridge_32b_bridge", *options]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for kind in ("convert", "train", "evaluate"):
        assert f"megarl: sbatch --test-only, {kind}: Job " in result.stderr
    assert "megarl: train would start when convert has succeeded (afterok)" in result.stderr
    assert "megarl: fits: the tightest is " in result.stderr
    row = f"{ROOT}/configs/reproduce/bridge_32b_bridge.yaml"
    started = [line for line in result.stdout.splitlines() if line.startswith("set -- ")]
    assert started == [
        "set -- --hf models/Qwen2.5-32B --out checkpoints/Qwen2.5-32B --tensor 8",
        f"set -- {row} model.weights=checkpoints/Qwen2.5-32B",
        f"set -- {row} name=bridge_32b_bridge runs_dir=runs checkpoint=runs/bridge_32b_bridge/hf --suite=bridge",
    ]
    assert result.stdout.count("#SBATCH --nodes=8\n") == 2 and list(tmp_path.iterdir()) == []


def test_the_template_of_conversions_takes_the_tool_by_its_arguments(tmp_path: Path) -> None:
    """The tool's line, in the shell itself."""
    lines = (ROOT / "slurm/convert.sbatch").read_text().splitlines()
    chosen = "\n".join(line for line in lines if "tool" in line and not line.startswith(("#", "run_tasks")))
    for arguments, tool in (
        ("--hf models/7b --out checkpoints/7b", "convert_hf_to_megatron"),
        ("--out checkpoints/7b --hf=models/7b", "convert_hf_to_megatron"),
        ("--megatron runs/a --out models/a", "convert_megatron_to_hf"),
        ("--megatron runs/a --out models/a --hf-config models/7b", "convert_megatron_to_hf"),
    ):
        script = f"set -- {arguments}\n{chosen}\necho $tool"
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == tool


LOOK = "Fix: lower what is asked of a node, or use another partition (sinfo -o '%P %D %c %G' shows nodes, cores, GPUs)."


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--partition gpux", "--partition gpux: is no partition of this cluster. Fix: use cpu, urgent or gpu."),
        (
            "--nodes 3",
            "--nodes 3: is more than the 2 of partition cpu. Fix: use fewer nodes, or another partition.",
        ),
        (
            "--time 1:00:01",
            "--time 1:00:01: is over the limit of partition cpu, 1:00:00. Fix: use a shorter time (a run that is cut "
            "goes on with resume=auto), or another partition.",
        ),
        (
            "--tasks-per-node 3",
            f"--nodes 1 with 3 tasks each: is more than the default partition has. {LOOK}",
        ),
        (
            "--sbatch=--tmp=900G --partition cpu",
            f"--nodes 1 with 1 task each: is more than partition cpu has. {LOOK}",
        ),
        (
            "--sbatch=--constraint=h100",
            "the job: is refused by Slurm: Invalid feature specification. Fix: correct what it names.",
        ),
    ],
)
@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_what_slurm_would_refuse(
    on_slurm: Submit, case: Path, slurm: Cluster, options: str, sentence: str, dry: list[str]
) -> None:
    nodes = [] if "--nodes" in options else ["--nodes", "1"]
    result = on_slurm("run.yaml", *CPU, *nodes, *options.split(), *dry)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"megarl: {sentence}\n"
    assert not (case / "runs").exists()
    assert not slurm.ask("squeue", "--noheader")


def test_an_array_with_what_follows_each_of_its_tasks(on_slurm: Submit, case: Path, slurm: Cluster) -> None:
    """Three seeds, of which one's training fails: what would follow it is dropped, the others go their way."""
    jobs = ("--array", "seeds=5,7,9", "--then", "evaluate evaluation.rows=1", "--then", "convert --max-file-size 2")
    result = on_slurm("run.yaml", "--nodes", "2", *CPU, *jobs, "data.system=a  'b'")
    assert result.returncode == 0, result.stderr
    train, evaluate, convert, watch, cancel = (line for line in result.stdout.splitlines() if not line.startswith("  "))
    first, second, third = (line.split("job ")[1].split(",")[0] for line in (train, evaluate, convert))
    assert train == f"train: job {first}, script runs/case/jobs/001-train.sbatch"
    assert evaluate == f"evaluate: job {second}, after {first}, script runs/case/jobs/001-2-evaluate.sbatch"
    assert convert == f"convert: job {third}, after {second}, script runs/case/jobs/001-3-convert.sbatch"
    assert watch == f"watch:  squeue --jobs={first},{second},{third}; tail -F runs/case/jobs/train-{first}_*.log"
    assert cancel == f"cancel: scancel {first} {second} {third}"
    folder = case / "runs" / "case" / "jobs"
    for task, seed in ((0, 5), (2, 9)):
        slurm.wait(f"{third}_{task}")
        settings = f"run.yaml data.system=a  'b' seed={seed} name=case-seed{seed}"
        where = f"runs/case-seed{seed}"
        called = {
            f"train-{first}": f"-m megarl train {settings.replace('run.yaml', 'run.yaml resume=auto')}",
            f"evaluate-{second}": f"-m megarl evaluate {settings} checkpoint={where} evaluation.rows=1",
            f"convert-{third}": f"{case / 'home'}/tools/convert_megatron_to_hf.py --megatron {where} --out {where}/hf "
            "--max-file-size 2",
        }
        for job, how in called.items():
            ranks = 1 if job.startswith("convert") else 2
            assert f"rank 0 of {ranks}: {how}\n" in (folder / f"{job}_{task}.log").read_text()
            assert (folder / f"{job}_{task}" / "rank-0.log").is_file()
    assert slurm.job(f"{first}_1")["JobState"] == "FAILED"
    assert not (folder / f"evaluate-{second}_1.log").exists()
    slurm.call("scancel", second, third)


def test_scripts_are_kept_and_the_printed_truth_is_not_overruled(on_slurm: Submit, case: Path, slurm: Cluster) -> None:
    held = ("run.yaml", "--nodes", "1", *CPU, "--sbatch=--hold", "--time", "11")
    numbers: list[str] = []
    for _ in range(2):
        result = on_slurm(*held, SBATCH_TIMELIMIT="7")
        assert result.returncode == 0, result.stderr
        job = result.stdout.split("job ")[1].split(",")[0]
        numbers.append(job)
        facts = slurm.job(job)
        assert (facts["JobName"], facts["TimeLimit"], facts["Requeue"]) == ("case", "00:11:00", "1")
    slurm.ask("scancel", *numbers)
    one_job = f"in the queue under this run's name already: {numbers[0]}; a run has one job at a time"
    assert result.stderr == f"megarl: {one_job}\n"
    kept = sorted(path.name for path in (case / "runs" / "case" / "jobs").iterdir())
    assert kept == ["001-train.sbatch", "002-train.sbatch"]


def test_a_job_may_wait_for_nodes_that_are_away(on_slurm: Submit, slurm: Cluster) -> None:
    slurm.ask("scontrol", "update", "NodeName=n2", "State=DRAIN", "Reason=memory")
    try:
        waits = on_slurm("run.yaml", *CPU, "--nodes", "2", "--sbatch=--hold")
        assert waits.returncode == 0, waits.stderr
        said = "megarl: sbatch --test-only, train: waits for nodes, of which 1 are down or drained ("
        assert said in waits.stderr
        # Which does not help what no node could give.
        for size, sentence in (
            ("--nodes 3", "--nodes 3: is more than the 2"),
            ("--nodes 1 --tasks-per-node 3", "--nodes 1 with 3 tasks each: is more than the default partition has"),
        ):
            refused = on_slurm("run.yaml", *CPU, *size.split())
            assert refused.returncode == 2 and sentence in refused.stderr
    finally:
        slurm.ask("scontrol", "update", "NodeName=n2", "State=RESUME")
    slurm.ask("scancel", waits.stdout.split("job ")[1].split(",")[0])
