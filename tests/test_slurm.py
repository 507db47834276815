"""Jobs on a real Slurm, from the templates in slurm/.

First what the templates make of a job's end, with a program of a few lines in megarl's place; then whole runs.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import slurm_cluster
from slurm_cluster import Cluster

ROOT = Path(__file__).resolve().parent.parent
TRAIN = str(ROOT / "slurm" / "train.sbatch")
FOUR_TASKS = ("--nodes=2", "--ntasks-per-node=2")

if lacking := slurm_cluster.missing():
    where = "Debian and Ubuntu: packages slurm-wlm and munge"
    pytest.skip(f"needs Slurm: this machine has no {', '.join(lacking)} ({where})", allow_module_level=True)

#: In megarl's place: says how it was called and ends as FATE says, which has a word for each start of the job. It waits
#: where no word ends it; asked to stop, it does so with megarl's exit code.
STAND_IN = """\
#!/usr/bin/env bash
echo "rank $SLURM_PROCID of $SLURM_NTASKS on $SLURMD_NODENAME at $MASTER_ADDR:$MASTER_PORT: $*"
trap 'echo "rank $SLURM_PROCID was asked to stop"; sleep 0.5; echo "rank $SLURM_PROCID has saved"; exit 75' USR1 TERM
fates=($FATE)
case ${fates[${SLURM_RESTART_COUNT:-0}]:-} in
    finish) exit 0 ;;
    refuse) ((SLURM_PROCID != 3)) || { echo "megarl: refused by rank 3" >&2; exit 2; } ;;
    die) ((SLURM_PROCID != 3)) || kill -KILL $$ ;;
esac
for _ in {1..600}; do sleep 0.1; done
"""


@pytest.fixture(autouse=True)
def no_jobs_left(slurm: Cluster) -> Iterator[None]:
    """Also after a test that failed."""
    yield
    slurm.cancel_all()


@pytest.fixture
def submit(slurm: Cluster, tmp_path: Path) -> Callable[..., str]:
    """Submits a job whose tasks are the stand-in, from a folder with run.yaml; returns the job's number."""
    home = tmp_path / "home"
    shutil.copytree(ROOT / "slurm", home / "slurm")
    (home / "launch").mkdir()
    shutil.copy(ROOT / "launch" / "environment.sh", home / "launch")
    program = home / "bin" / "python"
    program.parent.mkdir()
    program.write_text(STAND_IN)
    program.chmod(0o755)
    (tmp_path / "run.yaml").write_text("name: small\n")
    path = f"{program.parent}{os.pathsep}{slurm.environment['PATH']}"

    def submit(fate: str, *arguments: str, **environment: str) -> str:
        environment = {"FATE": fate, "MEGARL_HOME": str(home), "PATH": path} | environment
        return slurm.submit(*FOUR_TASKS, *arguments, cwd=tmp_path, **environment)

    return submit


def rank_log(folder: Path, job: str, rank: int) -> str:
    """What a rank has said so far, in all starts of the job."""
    file = folder / "logs" / job / f"rank-{rank}.log"
    return file.read_text() if file.is_file() else ""


def all_started(folder: Path, job: str) -> Callable[[], bool]:
    return lambda: all(f"rank {rank} of 4" in rank_log(folder, job, rank) for rank in range(4))


def test_every_rank_has_its_log_and_rank_0_is_in_front(
    slurm: Cluster, submit: Callable[..., str], tmp_path: Path
) -> None:
    job = submit("finish", TRAIN, "run.yaml", "steps=3", "resume=must")
    slurm.wait(job)
    port = 20000 + int(job) % 12000
    for rank, node in enumerate(("n1", "n1", "n2", "n2")):
        # The caller's settings are last, and win.
        said = (
            f"rank {rank} of 4 on {node} at 127.0.0.1:{port}: -m megarl train run.yaml resume=auto steps=3 resume=must"
        )
        assert said in rank_log(tmp_path, job, rank)
        assert (said in slurm.log(job)) == (rank == 0)


@pytest.mark.parametrize("fate, restarts", [("refuse", "0"), ("die refuse", "1")])
def test_a_refusal_ends_the_job_and_is_read_in_its_log(
    slurm: Cluster, submit: Callable[..., str], fate: str, restarts: str
) -> None:
    job = submit(fate, TRAIN, "run.yaml")
    slurm.wait_until(lambda: slurm.job(job)["Restarts"] == restarts, job, "the job has started as often as it may")
    ended = slurm.wait(job, "FAILED")
    # The other ranks, which were ended for it, say 75; but they only followed.
    assert (ended["ExitCode"], ended["Restarts"]) == ("2:0", restarts)
    log = slurm.log(job)
    assert "rank 3 on n2 ended first, with exit code 2\n" in log and "rank 3: megarl: refused by rank 3\n" in log


def test_a_killed_rank_starts_the_job_again_but_not_for_ever(slurm: Cluster, submit: Callable[..., str]) -> None:
    job = submit("die die", TRAIN, "run.yaml", MEGARL_MAX_RESTARTS="1")
    slurm.wait_until(lambda: slurm.job(job)["Restarts"] == "1", job, "the job goes back into the queue")
    ended = slurm.wait(job, "FAILED")
    assert (ended["ExitCode"], ended["Restarts"]) == ("137:0", "1")
    log = slurm.log(job)
    assert f"job {job} goes back into the queue, for restart 1 of at most 1" in log
    assert "start 2 on n[1-2]" in log and f"job {job} started again 1 times, its limit. Fix: " in log


@pytest.mark.parametrize("how", ["signal", "requeue", "preemption"])
def test_a_job_that_was_asked_to_stop_starts_again_once(
    slurm: Cluster, submit: Callable[..., str], tmp_path: Path, how: str
) -> None:
    job = submit("wait finish", TRAIN, "run.yaml")
    slurm.wait_until(all_started(tmp_path, job), job, "the tasks run")
    if how == "signal":
        slurm.ask("scancel", "--signal=USR1", job)
    elif how == "requeue":
        slurm.ask("scontrol", "requeue", job)
    else:
        submit("finish", "--partition=urgent", TRAIN, "run.yaml")
    ended = slurm.wait(job)
    assert ended["Restarts"] == "1"
    for rank in range(4):
        assert f"rank {rank} has saved" in rank_log(tmp_path, job, rank)
    put_back = f"job {job} goes back into the queue" in slurm.log(job)
    assert put_back == (how == "signal")


def test_a_cancelled_job_stays_ended(slurm: Cluster, submit: Callable[..., str], tmp_path: Path) -> None:
    job = submit("wait", TRAIN, "run.yaml")
    slurm.wait_until(all_started(tmp_path, job), job, "the tasks run")
    slurm.ask("scancel", job)
    slurm.wait_until(lambda: "not started again from here" in slurm.log(job), job, "the job says so")
    time.sleep(1)
    assert slurm.wait(job, "CANCELLED")["Restarts"] == "0"


def test_the_tasks_of_an_array_are_runs_of_their_own(
    slurm: Cluster, submit: Callable[..., str], tmp_path: Path
) -> None:
    """Both share both nodes; the last of an array has the array's own number, and only it may start again."""
    spread = ("--ntasks-per-node=1", "--array=3-4")
    array = submit("wait finish", *spread, TRAIN, "run.yaml")
    tasks = [f"{array}_{index}" for index in (3, 4)]
    together = lambda: all(f"rank {n} of 2" in rank_log(tmp_path, task, n) for task in tasks for n in (0, 1))  # noqa: E731
    slurm.wait_until(together, tasks[0], "both run at the same time")
    said = [rank_log(tmp_path, task, 0) for task in tasks]
    assert len({re.findall(r"127.0.0.1:(\d+)", text)[0] for text in said}) == 2
    for index, text in zip((3, 4), said, strict=True):
        assert f"run.yaml resume=auto seed={index} name=small-seed{index}\n" in text
    slurm.ask("scancel", "--signal=USR1", tasks[1])
    assert slurm.wait(tasks[1])["Restarts"] == "1"
    other = slurm.job(tasks[0])
    assert (other["JobState"], other["Restarts"]) == ("RUNNING", "0")


def test_a_job_from_elsewhere_says_what_it_misses(slurm: Cluster, tmp_path: Path) -> None:
    job = slurm.wait(slurm.submit(TRAIN, "run.yaml", cwd=tmp_path), "FAILED")
    assert job["ExitCode"] == "2:0"
    said = (
        f"megarl: {tmp_path}: must be megarl's repository. Fix: submit the job from there, or set MEGARL_HOME to it.\n"
    )
    assert slurm.log(job["JobId"]) == said


#: Prints the place that a task finds, by its launcher's variables and over MPI.
FIND_PLACE = """
import os
from megarl.parallel.place import find_place, place_over_mpi
place = find_place(os.environ)
with open(f"place-{os.environ['SLURM_PROCID']}", "w") as file:
    found = place_over_mpi(place, 60.0)
    print(found.rank, found.size, found.local_rank, found.node, file=file)
"""


@pytest.mark.parametrize("mpi", ["none", "pmix"])
def test_every_task_finds_its_place(slurm: Cluster, tmp_path: Path, mpi: str) -> None:
    """Under PMIx from MPI, but for the layout of nodes, of which Open MPI may know nothing there."""
    if mpi == "pmix" and (tried := slurm.call("srun", "--mpi=pmix", "true")).returncode:
        pytest.skip(f"this Slurm cannot load PMIx (Debian, Ubuntu: libpmix-dev): {tried.stderr.splitlines()[0]}")
    python = (sys.executable, "-c", FIND_PLACE)
    slurm.ask("srun", f"--mpi={mpi}", *FOUR_TASKS, *python, cwd=tmp_path, PYTHONPATH=str(ROOT))
    found = [(tmp_path / f"place-{rank}").read_text().split() for rank in range(4)]
    assert found == [["0", "4", "0", "0"], ["1", "4", "1", "0"], ["2", "4", "0", "1"], ["3", "4", "1", "1"]]


def test_tasks_that_mpi_takes_for_single_ones_say_so(slurm: Cluster, tmp_path: Path) -> None:
    """Open MPI 5 has PMIx alone."""
    python = (sys.executable, "-c", FIND_PLACE)
    asked = slurm.call("srun", "--mpi=pmi2", *FOUR_TASKS, *python, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert asked.returncode != 0
    assert "4 processes of which MPI knows 1: must find each other. Fix: start them by" in asked.stderr


def test_the_signal_comes_ahead_of_the_time_limit(slurm: Cluster, submit: Callable[..., str], tmp_path: Path) -> None:
    """Of one minute here, which is less than the template's five: it comes when Slurm first looks."""
    job = submit("wait finish", "--time=1", TRAIN, "run.yaml")
    slurm.wait(job)
    assert "rank 3 has saved" in rank_log(tmp_path, job, 3)
    assert "DUE TO TIME LIMIT" not in slurm.log(job) and f"job {job} goes back into the queue" in slurm.log(job)
