"""`megarl submit` as a user meets it: what is refused and how, and the script; the jobs are in test_submit_slurm.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import slurm_cluster
import yaml
from config_case import DENSE, write_case
from test_cli import CLEAN, ROOT, megarl
from test_plan_cli import CLUSTER

from megarl.submission.resources import nodes_for
from megarl.submission.script import read_template

CPU = ("--gpus-per-node", "0")
NO_DATA = "data.path=nowhere.jsonl: no such file. Fix: give a path relative to the working directory, or a hub name."
NO_SLURM = "sbatch: is not on this machine. Fix: submit on a login node of a cluster with Slurm.\n"


@pytest.fixture
def case(tmp_path: Path) -> Path:
    """A folder with a run whose files are there, and a path on which there is no program."""
    write_case(tmp_path, checkpoint={"every": 1})
    (tmp_path / "empty").mkdir()
    return tmp_path


def submitted(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`megarl submit run.yaml` on a machine without Slurm."""
    return megarl(folder, "submit", "run.yaml", *arguments, PATH=str(folder / "empty"))


def refused(folder: Path, *arguments: str) -> str:
    """The one sentence of a refusal, without the program's name; it leaves nothing behind."""
    before = sorted(folder.rglob("*"))
    result = submitted(folder, *arguments)
    assert (result.returncode, result.stdout) == (2, ""), result.stderr
    assert sorted(folder.rglob("*")) == before
    (line,) = result.stderr.splitlines(keepends=True)
    return line.removeprefix("megarl: ")


THEN = "Fix: use --then evaluate or --then convert, with arguments as in --then 'evaluate evaluation.path=FILE'.\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--nodes", "2", *CPU), NO_SLURM),
        (
            (),
            "--nodes: must be known, and the configuration has no gpus that say it. Fix: give --nodes N.\n",
        ),
        (
            CPU,
            "--nodes: must be known, and a run on CPUs does not say it. Fix: give --nodes N.\n",
        ),
        (
            ("gpus=12",),
            "gpus=12: does not fill nodes of 8 GPUs. Fix: give --nodes, with --gpus-per-node where a node's are not "
            "all used.\n",
        ),
        (
            ("--nodes", "2", *CPU, "batch.updates=5"),
            "batch.updates=5: must divide batch.prompts=12, so that every update gets an equal share. "
            "Fix: use 1, 2, 3, 4, 6 or 12.\n",
        ),
        (
            ("--nodes", "1", *CPU, "--tasks-per-node", "2", "parallel.tensor=4"),
            "--nodes 1 with 2 tasks each: starts 2 processes, fewer than the 4 of parallel.tensor x parallel.pipeline "
            "x parallel.context. Fix: use --nodes 2 or a multiple of it, or a smaller layout.\n",
        ),
        (
            ("--nodes", "3", *CPU, "--tasks-per-node", "2", "parallel.tensor=4"),
            "--nodes 3 with 2 tasks each: starts 6 processes, no multiple of the 4 of parallel.tensor x "
            "parallel.pipeline x parallel.context. Fix: use --nodes 2 or a multiple of it, or a smaller layout.\n",
        ),
        (
            ("--nodes", "2", *CPU, "parallel.processes=4"),
            "--nodes 2 with 1 task each: starts 2 processes, and the run is for parallel.processes=4. "
            "Fix: change the number of nodes or tasks, or give parallel.processes=null.\n",
        ),
        (
            ("--nodes", "1", *CPU, "data.path=nowhere.jsonl"),
            f"{NO_DATA}\n",
        ),
        (
            ("--nodes", "1", "--cluster", "a100"),
            "--cluster a100: is neither the name of a cluster nor a file. Fix: use h100 or h200, or the path of a YAML "
            "file like configs/clusters/h100.yaml.\n",
        ),
        (
            ("--nodes", "1", *CPU, "--array", "seeds=1,two"),
            "seed=two: must be a plain decimal number. Fix: give seed such a value (Seed of everything drawn).\n",
        ),
        (("--nodes", "1", *CPU, "--then", "rest"), f"--then rest: is no job that can follow. {THEN}"),
        (("--nodes", "1", *CPU, "--then", ""), f"--then : is no job that can follow. {THEN}"),
        (("--nodes", "1", *CPU, "--then", "evaluate 'x"), f"--then evaluate 'x: has a quote that does not end. {THEN}"),
        (
            ("--nodes", "1", *CPU, "--then", "evaluate evaluation.rows=4 evaluation.samples=4"),
            "evaluation.samples=4: needs evaluation.temperature > 0, since greedy answers are all the same. "
            "Fix: set evaluation.temperature, or samples to 1.\n",
        ),
        (
            ("--nodes", "1", *CPU, "--then", "evaluate"),
            "--then evaluate: would answer all of data.path, which the run learns from, as evaluation.path names "
            "nothing else. Fix: add evaluation.path=FILE, or evaluation.rows=N if that is meant.\n",
        ),
        (
            ("--nodes", "1", *CPU, "--then", "convert --sbatch=--nodes=2"),
            "--sbatch --nodes=2: is decided by megarl submit. Fix: use --nodes.\n",
        ),
        (
            ("--nodes", "1", *CPU, "--time", "5:00"),
            "--time 5:00: is not longer than the 300 s before the limit at which the run is told to save. "
            "Fix: give more time, or a later signal, such as --sbatch=--signal=USR1@60.\n",
        ),
        (
            ("--nodes", "1", *CPU, "--sbatch=--signal=B:USR1@60"),
            "--sbatch --signal=B:USR1@60: would go to the job's script, and not to the tasks, which save. "
            "Fix: leave B: away.\n",
        ),
        (
            ("--nodes", "1", *CPU, "--then", "convert --out=x", "--array", "seeds=0,1"),
            "--then convert --out=x: gives the runs of the array one folder. "
            "Fix: leave --out away: each is converted to hf/ in its own run's folder.\n",
        ),
        (
            ("--nodes", "1", *CPU, "--then", "convert", "checkpoint.export_hf=true"),
            "--then convert: would write the folder hf/ that checkpoint.export_hf=true writes already. "
            "Fix: leave one of the two away.\n",
        ),
    ],
)
def test_what_is_refused_without_asking_slurm(case: Path, arguments: tuple[str, ...], sentence: str) -> None:
    assert refused(case, *arguments) == sentence


def test_a_job_cannot_follow_a_run_that_saves_nothing(case: Path) -> None:
    never = ("checkpoint.every=0", "checkpoint.end=false", "resume=never")
    assert refused(case, "--nodes", "1", *CPU, *never, "--then", "evaluate") == (
        "--then evaluate: needs a checkpoint, which checkpoint.every=0 with checkpoint.end=false never saves. "
        "Fix: set checkpoint.end=true.\n"
    )


def test_what_an_earlier_run_of_that_name_makes_impossible(case: Path) -> None:
    """Five steps of 400 s and evaluations beside them; the template keeps some time for saving."""
    lines: list[object] = [{"step": n, "seconds": {"generate": 300.0, "update": 100.0 + n}} for n in range(-2, 3)]
    lines += [{"step": 0, "accuracy": 0.5, "seconds": {"evaluate": 9999.0}}] * 9
    run = case / "runs" / "case"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "sec')
    lead = int((read_template("train").option("signal") or "").partition("@")[2])
    time = f"{(400 + lead) // 60}:{(400 + lead) % 60 - 1:02d}"
    minutes = -(-(400 + lead) // 60)
    assert refused(case, "--nodes", "1", *CPU, "--time", time) == (
        f"--time {time}: is shorter than a step, 400 s by runs/case/metrics.jsonl, and the {lead} s before the limit "
        f"for saving. Fix: use --time 0:{minutes:02d}:00 or more.\n"
    )
    assert refused(case, "--nodes", "1", *CPU, "--time", f"0:{minutes:02d}:00") == NO_SLURM, "then Slurm is asked"
    assert refused(case, "--nodes", "1", *CPU, "--time", time, "name=other") == NO_SLURM
    assert refused(case, "--nodes", "1", *CPU, "resume=never") == (
        "name=case: already names a run, in runs/case, which a new one would mix with. "
        "Fix: continue it with resume=auto, choose another name, or move the folder away.\n"
    )


def test_a_run_that_does_not_fit_its_gpus_is_refused(case: Path) -> None:
    (case / "mine.yaml").write_text(yaml.safe_dump(CLUSTER | {"gpu_memory_gib": 1.001}))
    result = submitted(case, "--nodes", "2", "--cluster", "mine.yaml", "rollout.kv_cache_gib=0.1", "--dry-run")
    assert (result.returncode, result.stdout) == (2, "")
    refusal = result.stderr.splitlines()[-1]
    assert refusal.startswith(
        "megarl: case on 2 nodes with 4 GPUs of 1.0 GiB each: does not fit: push on pipeline stage 0 needs 1.5 GiB, "
        "and a GPU has 1.0 GiB. Fix: set "
    )


def test_what_the_gpus_cannot_do(case: Path) -> None:
    """Nor the CPU, for a job without any."""
    (case / "ada.yaml").write_text(yaml.safe_dump(CLUSTER | {"compute_capability": "8.9"}))
    on_ada = refused(case, "--nodes", "2", "--cluster", "ada.yaml", "deterministic=true")
    assert on_ada.startswith("deterministic=true on a GPU of compute capability 8.9: ")
    (case / "model" / "config.json").write_text(json.dumps(DENSE))
    given = ("precision=fp8-delayed", "fp8.param=true", "logging.tensorboard=false")
    assert refused(case, "--nodes", "2", *CPU, *given).startswith(
        "fp8.param=true with precision=fp8-delayed on the CPU: is not possible: "
    )


def test_a_dry_run_without_slurm_prints_the_script_and_leaves_nothing(case: Path) -> None:
    before = sorted(case.rglob("*"))
    odd = 'data.template=it\'s "{prompt}" $HOME'
    options = (
        "--time",
        "30",
        "--account",
        "lab",
        "--sbatch=--mem=0",
        "--sbatch=--exclusive",
        "data.path=nowhere.jsonl",
    )
    result = submitted(case, odd, "--nodes", "2", *CPU, "--tasks-per-node", "2", *options, "--dry-run")
    assert result.returncode == 0, result.stderr
    assert result.stderr == (
        f"megarl: a submission here would be refused: {NO_DATA}\n"
        f"megarl: Slurm was not asked whether it takes the job: {NO_SLURM}"
        "megarl: nothing was submitted or written\n"
    )
    assert sorted(case.rglob("*")) == before
    lines = result.stdout.splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    ours = [
        "#SBATCH --job-name=case",
        "#SBATCH --output=runs/case/jobs/train-%j.log",
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=2",
        "#SBATCH --time=30",
        "#SBATCH --account=lab",
        "#SBATCH --mem=0",
        "#SBATCH --exclusive",
    ]
    of_template = [line for line in read_template("train").header if line.startswith("#SBATCH")]
    kept = [line for line in of_template if "--job-name" not in line]
    directives = [line for line in lines if line.startswith("#SBATCH")]
    assert sorted(directives) == sorted(ours + kept)
    assert result.stdout.endswith(read_template("train").body.lstrip("\n"))
    # The arguments, as bash reads them.
    (arguments,) = (line for line in lines if line.startswith("set -- "))
    read = subprocess.run(
        ["bash", "-c", f"{arguments}\nprintf '%s\\0' \"$@\""], capture_output=True, text=True, check=True
    )
    assert read.stdout.split("\0")[:-1] == ["run.yaml", odd, "data.path=nowhere.jsonl"]


def test_a_dry_run_of_an_array_and_what_follows_it(case: Path) -> None:
    jobs = (
        "--array",
        "optimizer.lr=1e-6,2e-6",
        "--then",
        "evaluate evaluation.rows=4",
        "--then",
        "convert --dtype bf16",
    )
    result = submitted(case, "--nodes", "2", *CPU, "--tasks-per-node", "2", *jobs, "--dry-run")
    assert result.returncode == 0, result.stderr
    assert "megarl: evaluate would start when train has succeeded (aftercorr)\n" in result.stderr
    assert "megarl: convert would start when evaluate has succeeded (aftercorr)\n" in result.stderr
    train, evaluate, convert = (text.splitlines() for text in result.stdout.split("\n#### "))
    for job, script in (("case", train), ("case-evaluate", evaluate), ("case-convert", convert)):
        assert {f"#SBATCH --job-name={job}", "#SBATCH --array=0-1"} < set(script)
    assert "#SBATCH --output=runs/case/jobs/evaluate-%A_%a.log" in evaluate
    assert "    1) set -- run.yaml optimizer.lr=2e-6 name=case-lr2e-6 ;;" in train
    setting = "optimizer.lr=2e-6 name=case-lr2e-6 checkpoint=runs/case-lr2e-6 evaluation.rows=4"
    assert f"    1) set -- run.yaml {setting} ;;" in evaluate
    assert "    1) set -- --megatron runs/case-lr2e-6 --out runs/case-lr2e-6/hf --dtype bf16 ;;" in convert
    assert {"#SBATCH --nodes=1", "#SBATCH --ntasks-per-node=1"} < set(convert)


def test_a_job_that_follows_has_options_of_its_own(case: Path) -> None:
    """A conversion needs none of the nodes that the run has, nor their options."""
    jobs = ("--then", "convert --sbatch=--partition=small --sbatch=--mem=8G --sbatch=--cpus-per-task=2 --dtype bf16")
    asked = ("--partition", "big", "--cpus-per-task", "3", "--time", "1:00:00")
    asked += ("--sbatch=--exclusive", "--sbatch=--qos=high")
    result = submitted(case, "--nodes", "2", *CPU, *asked, *jobs, "--dry-run")
    assert result.returncode == 0, result.stderr
    train, convert = (
        {line for line in text.splitlines() if "#SBATCH" in line} for text in result.stdout.split("\n#### ")
    )
    common = {"#SBATCH --time=1:00:00", "#SBATCH --qos=high"}
    assert {"#SBATCH --partition=big", "#SBATCH --cpus-per-task=3", "#SBATCH --exclusive"} | common < train
    assert {"#SBATCH --partition=small", "#SBATCH --cpus-per-task=2", "#SBATCH --mem=8G"} | common < convert
    assert "#SBATCH --nodes=1" in convert and "#SBATCH --exclusive" not in convert
    assert "set -- --megatron runs/case --out runs/case/hf --dtype bf16\n" in result.stdout


def test_a_refusal_takes_a_moment_and_no_torch(case: Path) -> None:
    code = (
        "import sys; from megarl.cli import main\n"
        "sys.argv = 'megarl submit run.yaml --nodes 2 --gpus-per-node 0 --dry-run'.split()\n"
        "try: main.main()\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "heavy = {'torch', 'megatron', 'vllm', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    environment = CLEAN | {"PYTHONPATH": str(ROOT), "PATH": str(case / "empty")}
    subprocess.run([sys.executable, "-c", code], cwd=case, env=environment, check=True, timeout=10, capture_output=True)


@pytest.mark.skipif(bool(slurm_cluster.missing()), reason="needs Slurm's commands (Debian, Ubuntu: slurm-wlm, munge)")
def test_a_controller_that_is_away(case: Path) -> None:
    """Takes Slurm's own patience, 9 s."""
    (case / "slurm.conf").write_text(
        f"ClusterName=away\nSlurmctldHost={os.uname().nodename.split('.')[0]}(127.0.0.1)\nSlurmctldPort=1\n"
        f"AuthType=auth/munge\nAuthInfo=socket={case}/none\nNodeName=a\nPartitionName=p Nodes=a\n"
    )
    environment = {"SLURM_CONF": str(case / "slurm.conf"), "PATH": slurm_cluster.SEARCH}
    result = megarl(case, "submit", "run.yaml", "--nodes", "1", *CPU, **environment)
    assert result.returncode == 2
    assert result.stderr == (
        "megarl: scontrol: cannot reach Slurm (Unable to contact slurm controller (connect failure)). "
        "Fix: see whether Slurm's controller runs (scontrol ping).\n"
    )


def test_a_run_that_says_its_gpus_fills_nodes_or_a_part_of_one() -> None:
    assert nodes_for(24, 8) == (3, 8)
    assert nodes_for(4, 8) == (1, 4)
    assert nodes_for(8, 8) == (1, 8)
