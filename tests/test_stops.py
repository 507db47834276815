"""What a run that is asked to stop does with the time left, and what it says."""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import preloaded
import pytest

from megarl.cli import start
from megarl.config.health import HealthSettings
from megarl.errors import Interrupted, MegarlError, TrainingStopped
from megarl.health.stopping import Stopping
from megarl.parallel import terminal
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


def note(what: str) -> None:
    """Leave a file of this rank's."""
    Path(f"{what}.{os.environ.get('RANK', '0')}").touch()


def _wait_for_a_stop() -> tuple[str, float]:
    """On rank 0: by what it was asked to stop, and how many seconds are left then."""
    stopping = Stopping(HealthSettings(notice=500.0, term_notice=20.0))
    with stopping.listening():
        # The other rank listens too.
        note("ready")
        end = time.monotonic() + 60
        while not stopping.requested and time.monotonic() < end:
            time.sleep(0.01)
        return stopping.reason, stopping.seconds_left


def _wait_for_ever() -> None:
    """As a rank that is asked to stop and does not come to it."""
    stopping = Stopping(HealthSettings())
    with stopping.listening():
        note("ready")
        while True:
            time.sleep(0.01)
            if stopping.requested:
                note("asked")


def _start() -> None:
    """As a rank that does not listen yet."""
    note("ready")
    time.sleep(60)


def _on(terminal_name: str, work: Callable[[], object], processes: int, ignored: tuple[int, ...] = ()) -> None:
    """Launch on a terminal, which becomes this session's. As the command line, and with what a command finds."""
    if terminal_name:
        terminal_file = os.open(terminal_name, os.O_RDWR)
        for stream in range(3):
            os.dup2(terminal_file, stream)
        os.close(terminal_file)
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    terminal.keep()
    start.answer_stops(1.0)
    try:
        Path("found").write_text(json.dumps(launch(work, (), processes)))
    except MegarlError as error:
        terminal.say(str(error))
        sys.exit(error.exit_code)


class Terminal:
    """A terminal that a process of a test has, and what was printed on it."""

    def __init__(self) -> None:
        self._held, other = os.openpty()
        self.name = os.ttyname(other)
        self._other = other

    def press(self, key: bytes) -> None:
        os.write(self._held, key)

    def hang_up(self) -> None:
        os.close(self._other)
        os.close(self._held)

    def printed(self) -> str:
        found = b""
        while select.select([self._held], [], [], 0)[0]:
            found += os.read(self._held, 1 << 16)
        return found.decode().replace("\r", "")


def wait_for(started: preloaded.Started, files: list[Path]) -> None:
    end = time.monotonic() + 60
    while not all(file.exists() for file in files):
        assert started.poll() is None and time.monotonic() < end, started.communicate(10)
        time.sleep(0.01)


def ready(folder: Path, ranks: int, what: str = "ready") -> list[Path]:
    return [folder / f"{what}.{rank}" for rank in range(ranks)]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("sent", "left"),
    [(signal.SIGTERM, 20.0), (signal.SIGUSR1, 500.0), (signal.SIGHUP, 20.0), (signal.SIGQUIT, 20.0)],
)
def test_all_signals_that_ask_for_a_stop_come_with_the_time_they_leave(
    tmp_path: Path, sent: signal.Signals, left: float, ranks: int
):
    """A scheduler that says SIGTERM gives less time than one that sends the signal that it was asked to send."""
    started = preloaded.Started(_on, "", _wait_for_a_stop, ranks, folder=tmp_path)
    wait_for(started, ready(tmp_path, ranks))
    # To the launcher alone, or to all of its processes, as systems differ in that.
    os.kill(started.pid, sent) if sent in (signal.SIGTERM, signal.SIGUSR1) else os.killpg(started.pid, sent)
    output, _ = started.communicate(120)
    assert started.returncode == 0, output
    reason, found = json.loads((tmp_path / "found").read_text())
    assert reason == sent.name
    assert left - 10 < found <= left
    assert output.count("the run stops as soon as its state is saved") == 1


@pytest.mark.parametrize("ranks", [1, 2])
def test_ctrl_c_is_a_stop_and_a_second_one_the_end(tmp_path: Path, ranks: int):
    screen = Terminal()
    started = preloaded.Started(_on, screen.name, _wait_for_ever, ranks, folder=tmp_path)
    wait_for(started, ready(tmp_path, ranks))
    screen.press(b"\x03")
    wait_for(started, ready(tmp_path, ranks, "asked"))
    said = "megarl: SIGINT: the run stops as soon as its state is saved; a second SIGINT ends it at once\n"
    assert screen.printed() == f"^C{said}"
    pressed = time.monotonic()
    screen.press(b"\x03")
    started.communicate(20)
    assert started.returncode == 75 and time.monotonic() - pressed < 5
    said = "megarl: ended at once by a second SIGINT: what was saved before stays, go on with resume=auto\n"
    assert screen.printed() == f"^C{said}"


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_terminal_that_hangs_up_is_a_stop_and_under_nohup_nothing(tmp_path: Path, ranks: int):
    screen = Terminal()
    started = preloaded.Started(_on, screen.name, _wait_for_a_stop, ranks, folder=tmp_path)
    wait_for(started, ready(tmp_path, ranks))
    screen.hang_up()
    started.communicate(60)
    assert started.returncode == 0
    assert json.loads((tmp_path / "found").read_text())[0] == "SIGHUP"

    for file in ready(tmp_path, ranks):
        file.unlink()
    screen = Terminal()
    ignored = (signal.SIGHUP, signal.SIGINT)
    started = preloaded.Started(_on, screen.name, _wait_for_a_stop, ranks, ignored, folder=tmp_path)
    wait_for(started, ready(tmp_path, ranks))
    screen.press(b"\x03")
    screen.hang_up()
    time.sleep(0.5)
    assert started.poll() is None
    os.kill(started.pid, signal.SIGTERM)
    started.communicate(60)
    assert json.loads((tmp_path / "found").read_text())[0] == "SIGTERM"


def test_a_stop_before_the_ranks_listen_is_one_sentence(tmp_path: Path):
    started = preloaded.Started(_on, "", _start, 2, folder=tmp_path)
    wait_for(started, ready(tmp_path, 2))
    os.killpg(started.pid, signal.SIGINT)
    output, _ = started.communicate(60)
    assert (started.returncode, output) == (75, "megarl: stopped at SIGINT, while it started: start it again\n")
