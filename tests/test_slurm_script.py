"""The shell of slurm/, function by function; no Slurm is needed, as its commands are functions here."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

#: `srun` prints its arguments; where the ranks meet is Slurm's name for the node, as it has no other.
COMMANDS = """
srun() { printf '%s\\n' "$@"; }
scontrol() { :; }
"""


def shell(folder: Path, script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script in `folder` after slurm/common.sh, as a job of number 7."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "MEGARL_"))}
    clean |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_PROCID": "0", "home": str(ROOT)}
    text = f'source "$home/slurm/common.sh"\n{COMMANDS}{script}'
    return subprocess.run(
        ["bash", "-c", text], cwd=folder, env=clean | environment, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(
    "environment, settings, overrides",
    [
        ({}, "", ""),
        ({"SLURM_ARRAY_TASK_ID": "3"}, "", "seed=3 name=file-seed3"),
        ({"SLURM_ARRAY_TASK_ID": "3"}, "name=first name=given", "seed=3 name=given-seed3"),
        ({"SLURM_ARRAY_TASK_ID": "3", "MEGARL_ARRAY_KEY": "data.seed"}, "", "data.seed=3 name=file-seed3"),
        ({"SLURM_ARRAY_TASK_ID": "3", "MEGARL_ARRAY_KEY": ""}, "", ""),
    ],
)
def test_a_task_of_an_array_is_a_run_of_its_own(
    tmp_path: Path, environment: dict[str, str], settings: str, overrides: str
) -> None:
    (tmp_path / "run.yaml").write_text("name: file\n")
    script = f'set_array_overrides run.yaml {settings}; echo "${{array_overrides[*]}}"'
    finished = shell(tmp_path, script, **environment)
    assert (finished.stdout, finished.stderr) == (f"{overrides}\n", "")


@pytest.mark.parametrize(
    "text, name",
    [
        ("name: plain", "plain"),
        ("steps: 3\nname: 'quoted' # and explained", "quoted"),
        ('name: "a.b-c"  \nmodel:\n  name: other', "a.b-c"),
        ("base: base.yaml\nname: own", "own"),
        ("base: folder/base.yaml\n", "inherited"),
        ("base: {folder}/folder/base.yaml\n", "inherited"),
        ("model:\n  name: other", ""),
    ],
)
def test_the_runs_name_is_read_from_its_file(tmp_path: Path, text: str, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "base.yaml").write_text("base: ../root.yaml")
    (tmp_path / "root.yaml").write_text("name: inherited\n")
    (tmp_path / "run.yaml").write_text(text.replace("{folder}", str(tmp_path)))
    assert shell(tmp_path, "run_name run.yaml steps=1").stdout == f"{name}\n"


def test_an_array_without_a_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("steps: 3\n")
    finished = shell(
        tmp_path, "set_array_overrides run.yaml; echo not here", SLURM_ARRAY_TASK_ID="0", SLURM_ARRAY_JOB_ID="6"
    )
    said = "megarl: run.yaml: has no name that the array's runs could be called after. Fix: add name=NAME.\n"
    assert (finished.returncode, finished.stdout, finished.stderr) == (2, "", said)


@pytest.mark.parametrize(
    "gpus, tasks, refusal",
    [
        (None, "2(x2)", ""),
        ("8", "8(x2)", ""),
        ("8", "1", "1 task(s) on a node with 8 GPU(s): must be one per GPU. Fix: sbatch --ntasks-per-node=8."),
        ("2", "4(x3),2", "4 task(s) on a node with 2 GPU(s): must be one per GPU. Fix: sbatch --ntasks-per-node=2."),
    ],
)
def test_there_is_one_task_per_gpu(tmp_path: Path, gpus: str | None, tasks: str, refusal: str) -> None:
    environment = {"SLURM_TASKS_PER_NODE": tasks} | ({"SLURM_GPUS_ON_NODE": gpus} if gpus else {})
    finished = shell(tmp_path, "require_one_task_per_gpu", **environment)
    assert finished.returncode == (2 if refusal else 0)
    assert finished.stderr == (f"megarl: {refusal}\n" if refusal else "")


def started(folder: Path, **environment: str) -> list[str]:
    """The arguments of srun for `python program`."""
    finished = shell(folder, "run_tasks none python program", **environment)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.splitlines()


def test_tasks_are_started_by_srun(tmp_path: Path) -> None:
    environment = {"SLURM_CPUS_PER_TASK": "12", "MEGARL_SRUN": "--label --exclusive"}
    options, _, command = " ".join(started(tmp_path, **environment)).partition(" bash ")
    expected = "--mpi=none --kill-on-bad-exit=1 --wait=0 --export=ALL --cpu-bind=cores --distribution=block:block"
    assert options == f"{expected} --cpus-per-task=12 --label --exclusive"
    assert command == f"{ROOT}/slurm/task.sh {tmp_path}/logs/7 python program"


def test_containers_see_the_repository_and_the_working_folder(tmp_path: Path) -> None:
    more = {"MEGARL_MOUNTS": "/scratch:/scratch", "SLURM_GPUS_ON_NODE": "8"}
    mounts = f"{ROOT}:{ROOT},{tmp_path}:{tmp_path},{tmp_path}/logs/7:{tmp_path}/logs/7,/scratch:/scratch"
    options = started(tmp_path, MEGARL_PYXIS="an image.sqsh", **more)
    expected = ["--container-image=an image.sqsh", f"--container-mounts={mounts}", f"--container-workdir={tmp_path}"]
    assert options[6:9] == expected and options[-2:] == ["python", "program"]

    options = started(tmp_path, MEGARL_APPTAINER="an image.sif", **more)
    expected = ["apptainer", "exec", "--bind", mounts, "--pwd", str(tmp_path), "--nv", "an image.sif"]
    assert options[-10:] == [*expected, "python", "program"]


def test_ranks_meet_on_a_port_that_is_free(tmp_path: Path) -> None:
    """Two jobs on one node may come to the same port by their numbers."""
    job, listener = 7, socket.socket()
    with listener:
        while True:
            try:
                listener.bind(("", 20000 + job))
                break
            except OSError:
                job += 1
        listener.listen()
        finished = shell(tmp_path, "set_meeting_point; echo $MASTER_ADDR $MASTER_PORT", SLURM_JOB_ID=str(job + 12000))
        address, port = finished.stdout.split()
    assert address == socket.gethostname()
    assert 20000 + job < int(port) < 20000 + job + 10


def task(folder: Path, rank: int, command: str) -> subprocess.CompletedProcess[str]:
    """slurm/task.sh as task `rank` with its logs in `folder`/logs."""
    environment = os.environ | {"SLURM_PROCID": str(rank), "SLURMD_NODENAME": f"n{rank}"}
    program = ["bash", str(ROOT / "slurm" / "task.sh"), str(folder / "logs"), "bash", "-c", command]
    return subprocess.run(program, env=environment, capture_output=True, text=True, timeout=60)


def test_the_first_task_that_fails_is_the_one_that_is_noted(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    assert task(tmp_path, 2, "echo fine").returncode == 0
    assert task(tmp_path, 3, "echo words; echo error >&2; exit 2").returncode == 2
    last = task(tmp_path, 0, "echo in front; kill -TERM $$")
    assert (last.returncode, last.stderr) == (143, "") and last.stdout.startswith("in front\n")
    assert (tmp_path / "logs" / "first_failure").read_text() == "2 3 n3\n"
    assert (tmp_path / "logs" / "rank-3.log").read_text() == "megarl: start 1 on n3\nwords\nerror\n"
    assert (tmp_path / "logs" / "rank-0.log").read_text().startswith("megarl: start 1 on n0\nin front\n")


def test_a_task_that_does_not_see_the_logs_says_so(tmp_path: Path) -> None:
    finished = task(tmp_path, 1, "true")
    said = f"megarl: {tmp_path}/logs: must be a folder that {socket.gethostname()} sees too. Fix: set MEGARL_LOGS to a"
    assert finished.returncode == 2 and finished.stderr.startswith(said)


@pytest.mark.parametrize(
    ("template", "state", "end", "said"),
    [
        ("train", "RUNNING None", "requeue 7", "goes back into the queue, for restart 1 of at most 20"),
        ("train", "COMPLETING TimeLimit", "requeue 7", "goes back into the queue"),
        ("train", "CANCELLED None", "", "is being ended by Slurm or its user, and not started again from here"),
        # A controller that is too busy to say is no reason to give up.
        ("train", "", "requeue 7", "goes back into the queue"),
        ("evaluate", "RUNNING None", "requeue 7", "goes back into the queue"),
        ("evaluate near its end", "RUNNING None", "", "reached its time limit, and would start from the beginning"),
        ("evaluate", "COMPLETING TimeLimit", "", "reached its time limit, and would start from the beginning"),
    ],
)
def test_what_a_job_does_at_its_end(tmp_path: Path, template: str, state: str, end: str, said: str) -> None:
    """After tasks that ended with megarl's code for a start again."""
    ends = time.time() + (200 if template.endswith("end") else 9000)
    template = template.split()[0]
    functions = f"""
sleep() {{ :; }}
squeue() {{ [[ -z "{state}" ]] || echo "{state}"; }}
scontrol() {{ [[ $1 != requeue ]] || echo "$*" >asked; }}
srun() {{ return 75; }}
python() {{ :; }}
run() {{ source <(sed '/common.sh"$/d' "$home/slurm/{template}.sbatch"); }}
run run.yaml
"""
    job = {"SLURM_TASKS_PER_NODE": "1", "SLURM_JOB_END_TIME": str(int(ends))}
    finished = shell(tmp_path, functions, SLURM_SUBMIT_DIR=str(ROOT), **job)
    assert finished.returncode == 75, finished.stderr
    assert said in finished.stderr
    asked = tmp_path / "asked"
    assert (asked.read_text().strip() if asked.exists() else "") == end
