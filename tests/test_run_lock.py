"""One run in one folder: who holds the lock is named, and what a killed run leaves behind is in nobody's way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from megarl.errors import Refusal
from megarl.health import run_lock
from megarl.health.run_lock import Holder, RunLock

HOLD = """
import sys, time
from pathlib import Path
from megarl.health.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.take(print)
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)


def hold(folder: Path) -> subprocess.Popen[str]:
    """A process that holds the lock of `folder` and sleeps."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def never(error: Refusal) -> None:
    raise AssertionError(error)


def wait_for(reached: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def leave(folder: Path, **changes: Any) -> Holder:
    """A lock in `folder` as another holder left it."""
    holder = replace(Holder.this_process(), host="gpu07", pid=77, began="b/1", token="other")
    holder = replace(holder, **changes)
    (folder / "lock").write_text(json.dumps(asdict(holder)))
    return holder


def test_a_living_holder_is_named_and_a_killed_one_is_passed_over(tmp_path: Path):
    process = hold(tmp_path)
    since = json.loads((tmp_path / "lock").read_text())["since"]
    with pytest.raises(Refusal) as refused:
        RunLock(tmp_path).take(never)
    host = Holder.this_process().host
    assert str(refused.value) == (
        f"{tmp_path} held by process {process.pid} on {host} since {since}: two runs must not write one folder. "
        "Fix: wait for it or stop it, or give this run another name."
    )
    process.send_signal(signal.SIGKILL)
    said: list[str] = []
    # Also before anybody has waited for it: a zombie holds nothing.
    time.sleep(0.2)
    lock = RunLock(tmp_path, said.append)
    lock.take(never)
    process.wait()
    assert said == [f"taking over {tmp_path} from process {process.pid} on {host}, which has ended"]
    assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_another_process_with_the_number_of_the_holder_is_not_the_holder(tmp_path: Path):
    leave(tmp_path, host=Holder.this_process().host, pid=os.getpid(), began="another boot/5")
    RunLock(tmp_path).take(never)


def test_a_job_that_was_put_back_into_the_queue_takes_its_own_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    leave(tmp_path, job="12")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    said: list[str] = []
    RunLock(tmp_path, said.append).take(never)
    assert said[0].endswith("from job 12, process 77 on gpu07, this job before it was put back into the queue")


@pytest.mark.parametrize("alive", [True, False])
def test_a_holder_on_another_host_shows_by_its_signs_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alive: bool
):
    monkeypatch.setattr(run_lock, "PATIENCE", 2.5)
    holder = leave(tmp_path)
    stopped = threading.Event()

    def live() -> None:
        while not stopped.wait(0.4):
            os.utime(tmp_path / "lock")

    thread = threading.Thread(target=live)
    if alive:
        thread.start()
    said: list[str] = []
    lock = RunLock(tmp_path, said.append)
    try:
        if alive:
            with pytest.raises(Refusal, match=f"held by process 77 on gpu07 since {holder.since}: two runs must not"):
                lock.take(never)
        else:
            lock.take(never)
            assert said[1].endswith("from process 77 on gpu07, which gave no sign of life for 2 s")
    finally:
        stopped.set()
        if alive:
            thread.join()


def test_signs_of_life_are_given_until_the_lock_is_released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run_lock, "REFRESH", 0.05)
    lock = RunLock(tmp_path)
    lock.take(never)
    os.utime(tmp_path / "lock", (1.0, 1.0))
    wait_for(lambda: (tmp_path / "lock").stat().st_mtime > 1e9)
    # Also where somebody removed it.
    (tmp_path / "lock").unlink()
    wait_for((tmp_path / "lock").exists)
    lock.release()
    time.sleep(0.2)
    assert list(tmp_path.iterdir()) == []


def test_who_lost_the_lock_is_told_by_whom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As a run that was suspended for longer than others wait."""
    monkeypatch.setattr(run_lock, "REFRESH", 0.05)
    lost: list[Refusal] = []
    lock = RunLock(tmp_path)
    lock.take(lost.append)
    time.sleep(0.2)
    assert lost == []
    holder = leave(tmp_path)
    wait_for(lambda: lost)
    os.utime(tmp_path / "lock", (1.0, 1.0))
    time.sleep(0.2)
    assert str(lost[0]).startswith(f"{tmp_path} held by process 77 on gpu07 since {holder.since}: two runs must not")
    # The other one's is not kept alive, nor released.
    assert (tmp_path / "lock").stat().st_mtime == 1.0
    lock.release()
    assert (tmp_path / "lock").exists()


def test_a_machine_of_the_same_name_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run_lock, "PATIENCE", 1.5)
    own = Holder.this_process()
    leave(tmp_path, host=own.host, machine="another boot", pid=own.pid, began=own.began)
    said: list[str] = []
    RunLock(tmp_path, said.append).take(never)
    assert said[1].endswith("which gave no sign of life for 2 s")


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(Refusal, match=r"file/run on \S+: must be a folder that a run can write \(Not a directory\)"):
        RunLock(tmp_path / "file" / "run").take(never)


def test_a_lock_that_was_taken_over_is_not_released_by_its_old_holder(tmp_path: Path):
    lock = RunLock(tmp_path)
    lock.take(never)
    leave(tmp_path)
    lock.release()
    assert (tmp_path / "lock").exists()


def test_a_lock_of_an_earlier_version_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run_lock, "PATIENCE", 1.5)
    holder = asdict(leave(tmp_path))
    del holder["machine"]
    (tmp_path / "lock").write_text(json.dumps(holder))
    said: list[str] = []
    RunLock(tmp_path, said.append).take(never)
    assert said[1].endswith("from process 77 on gpu07, which gave no sign of life for 2 s")


def test_a_folder_that_was_made_for_the_lock_alone_goes_with_it(tmp_path: Path):
    lock = RunLock(tmp_path / "runs" / "mine")
    lock.take(never)
    lock.release()
    assert list(tmp_path.iterdir()) == []
    lock = RunLock(tmp_path / "runs" / "mine")
    lock.take(never)
    (tmp_path / "runs" / "mine" / "config.yaml").touch()
    lock.release()
    assert [path.name for path in (tmp_path / "runs" / "mine").iterdir()] == ["config.yaml"]


def test_a_torn_lock_is_nobodys(tmp_path: Path):
    (tmp_path / "lock").write_text('{"host": "gpu0')
    RunLock(tmp_path).take(never)


def test_of_many_that_come_at_once_one_holds_it(tmp_path: Path):
    leave(tmp_path, host=Holder.this_process().host, pid=2**22 + 1)
    held: list[RunLock] = []
    refused: list[str] = []

    def come() -> None:
        lock = RunLock(tmp_path)
        try:
            lock.take(never)
            held.append(lock)
        except Refusal as error:
            refused.append(str(error))

    threads = [threading.Thread(target=come) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(held) == 1 and len(refused) == 11
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_what_slurm_says_of_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """squeue is Slurm's own word; its answers are those of 22.05."""
    squeue = tmp_path / "bin" / "squeue"
    squeue.parent.mkdir()
    monkeypatch.setenv("PATH", f"{squeue.parent}:{os.environ['PATH']}")
    answers = {
        "echo RUNNING": False,
        "echo COMPLETED": True,
        "echo CANCELLED": True,
        "echo PENDING": True,
        "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1": True,
        "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1": False,
    }
    for script, ended in answers.items():
        squeue.write_text(f"#!/bin/sh\n{script}\n")
        squeue.chmod(0o755)
        assert run_lock._slurm_ended("12") is ended, script
