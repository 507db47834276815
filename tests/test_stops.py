"""What a run that is asked to stop does with the time left, and what it says."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import preloaded
import pytest

from megarl.config.health import HealthSettings
from megarl.errors import Interrupted, TrainingStopped
from megarl.health.stopping import Stopping
from megarl.parallel.launch import launch
from megarl.train import run
from megarl.train.stops import Stops


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock, to be moved on by hand."""
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    return clock


def stops(now: list[float], step: float | None, save: float) -> tuple[Stopping, Stops]:
    """Of a run whose last step and save took so many seconds."""
    stopping = Stopping(HealthSettings())
    found = Stops(stopping)
    if step is not None:
        found.step_begins()
        now[0] += step
        found.step_ends()
    found.saved(save)
    found.step_begins()
    return stopping, found


def test_a_step_that_fits_is_finished_and_one_that_does_not_is_given_up(now: list[float]):
    stopping, found = stops(now, step=100.0, save=30.0)
    now[0] += 40.0
    assert not found.too_late
    stopping.request("SIGUSR1", 91.0)
    # 60 s are left of the step, and 30 s for the save.
    assert not found.too_late and stopping.seconds_left == 91.0
    now[0] += 2.0
    assert not found.too_late
    stopping.request("SIGTERM", 80.0)
    assert found.too_late and found.reason == "SIGUSR1"


def test_a_step_that_takes_longer_than_the_last_is_waited_for_while_a_save_still_fits(now: list[float]):
    stopping, found = stops(now, step=10.0, save=30.0)
    now[0] += 50.0
    stopping.request("SIGUSR1", 31.0)
    assert not found.too_late
    now[0] += 2.0
    assert found.too_late


def test_a_first_step_is_given_up_as_nobody_knows_how_long_it_takes(now: list[float]):
    stopping, found = stops(now, step=None, save=0.0)
    assert not found.too_late
    stopping.request("SIGUSR1", 270.0)
    assert found.too_late


def session(step: int, saved: int | None) -> Any:
    return SimpleNamespace(
        progress=SimpleNamespace(step=step),
        saved_step=saved,
        stops=SimpleNamespace(reason="SIGUSR1"),
        config=SimpleNamespace(name="r", health=HealthSettings()),
    )


def test_a_job_that_is_shorter_than_a_step_is_not_started_again(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time() + 290)))
    error = run._stopped(session(5, 5), first=5)
    assert isinstance(error, TrainingStopped) and error.exit_code == 2
    assert "the time limit is shorter than a step. Fix: submit with a longer --time" in str(error)
    # One step more than before, or a stop in the midst of the job's time, is worth another start.
    for first, end in ((4, 290), (5, 9000)):
        monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time() + end)))
        assert run._stopped(session(5, 5), first=first).exit_code == Interrupted.exit_code == 75


def test_what_was_saved_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    assert str(run._stopped(session(5, 5), 3)) == "r stopped at SIGUSR1, saved after step 5: go on with resume=auto"
    said = str(run._stopped(session(0, None), 0))
    assert said == "r stopped at SIGUSR1, as saved before; no step was finished since: go on with resume=auto"


def _wait_for_a_stop() -> tuple[str, float]:
    """On rank 0, which asks its launcher to stop: by what it was asked then, and how many seconds are left."""
    stopping = Stopping(HealthSettings(notice=500.0, term_notice=20.0))
    with stopping.listening():
        # The other rank listens too.
        ready = Path(f"ready.{os.environ['RANK']}")
        ready.touch()
        end = time.monotonic() + 60
        while len(list(Path().glob("ready.*"))) < 2 and time.monotonic() < end:
            time.sleep(0.01)
        if os.environ["RANK"] == "0":
            os.kill(os.getppid(), int(os.environ["SENT"]))
        while not stopping.requested and time.monotonic() < end:
            time.sleep(0.01)
        return stopping.reason, stopping.seconds_left


def _launch_and_stop() -> None:
    Path("found").write_text(json.dumps(launch(_wait_for_a_stop, (), 2)))


@pytest.mark.parametrize(("sent", "left"), [(signal.SIGTERM, 20.0), (signal.SIGUSR1, 500.0)])
def test_the_launcher_passes_on_which_signal_it_was(tmp_path: Path, sent: signal.Signals, left: float):
    """A scheduler that says SIGTERM gives less time than one that sends the signal that it was asked to send."""
    started = preloaded.Started(_launch_and_stop, folder=tmp_path, SENT=str(int(sent)))
    output, _ = started.communicate(120)
    assert started.returncode == 0, output
    reason, found = json.loads((tmp_path / "found").read_text())
    assert reason == sent.name
    assert left - 10 < found <= left
