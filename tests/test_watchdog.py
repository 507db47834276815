"""Ranks that hang, die or fail, in real processes over gloo: the others end in time, and one message names them."""

from __future__ import annotations

import os
import re
import signal
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import preloaded
import pytest
import torch
import torch.distributed as dist
from ports import free_port

from megarl.config.health import HealthSettings
from megarl.errors import Refusal
from megarl.health.guard import Guard, watching
from megarl.parallel import bootstrap, progress

HOST = socket.gethostname()
#: `limits` bound a phase in which somebody works; `silence` finds who is stopped.
SETTINGS = HealthSettings(interval=0.2, silence=5.0, first_limit=20, limits={"score": 3.0, "push": 3.0})
RANKS = 3


def behave(rank: int, deed: str, folder: str, port: int) -> None:
    """Be a rank of a run in which rank 1 (or 0, for a deed of `first_`) does `deed` after two collectives."""
    torch.set_num_threads(1)
    log = os.open(f"{folder}/{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    code = 0
    try:
        world = bootstrap.join(timeout_minutes=5, join_limit=60)
        with watching(SETTINGS, world, Path(folder), {}) as guard, guard.one_voice():
            if deed == "first_stops_at_once":
                dist.barrier()
                Path(folder, f"{rank}.began").write_text(str(time.monotonic()))
                first_stops(rank, guard)
            progress.enter("generate")
            dist.barrier()
            progress.enter("score")
            dist.barrier()
            Path(folder, f"{rank}.began").write_text(str(time.monotonic()))
            DEEDS[deed](rank, guard)
            dist.barrier()
            Path(folder, f"{rank}.end").write_text("")
        bootstrap.leave()
    except Refusal as refusal:
        print(f"said: {refusal.delivered}", flush=True)
        code = refusal.exit_code
    except BaseException as error:
        code = getattr(error, "exit_code", 99)
    os._exit(code)


def kill_itself(number: int) -> Callable[[int, Guard], None]:
    def deed(rank: int, guard: Guard) -> None:
        if rank == 1:
            os.kill(os.getpid(), number)

    return deed


def sleep(rank: int, guard: Guard) -> None:
    while rank == 1:
        time.sleep(0.1)


def work_on(rank: int, guard: Guard) -> None:
    """For longer than the limit, with progress."""
    for _ in range(60 if rank == 1 else 0):
        time.sleep(0.1)
        progress.tick()


def first_stops(rank: int, guard: Guard) -> None:
    if rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)


def fail(rank: int, guard: Guard) -> None:
    if rank == 1:
        raise ValueError("no such thing")


def refuse(rank: int, guard: Guard) -> None:
    raise Refusal("x=1", "must not be", "leave it")


def wait_crosswise(rank: int, guard: Guard) -> None:
    progress.enter("push")
    if rank != 0:
        dist.recv(torch.zeros(1), src=3 - rank)


def stop_one(rank: int, guard: Guard) -> None:
    if rank == 2:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert guard.stopping.requested
    for _ in range(50):
        if guard.stopping.agreed():
            break
        time.sleep(0.05)
    assert guard.stopping.requested and guard.stopping.reason in ("SIGUSR1", "another rank was asked to stop")
    assert 200 < guard.stopping.seconds_left <= SETTINGS.notice


DEEDS: dict[str, Callable[[int, Guard], None]] = {
    "nothing": lambda rank, guard: None,
    "die": kill_itself(signal.SIGKILL),
    "stop": kill_itself(signal.SIGSTOP),
    "sleep": sleep,
    "work_on": work_on,
    "first_stops": first_stops,
    "fail": fail,
    "refuse": refuse,
    "wait_crosswise": wait_crosswise,
    "stop_one": stop_one,
}


@dataclass
class Ended:
    """How the ranks ended: exit codes, logs, whether each came to its end; seconds since the deed; the run's folder."""

    codes: list[int]
    logs: list[str]
    ends: list[bool]
    seconds: float
    folder: Path

    @property
    def messages(self) -> list[str]:
        return [line for log in self.logs for line in log.splitlines() if line.startswith("megarl: ")]


@pytest.fixture
def run():
    """Start the ranks for a deed and wait until they have ended; what is left after 90 s is killed."""
    with tempfile.TemporaryDirectory() as folder:

        def start(deed: str) -> Ended:
            # Forked from a process without threads, which has imported what is slow.
            context = preloaded.context()
            port, began = free_port(), time.monotonic()
            ranks = [context.Process(target=behave, args=(rank, deed, folder, port)) for rank in range(RANKS)]
            for process in ranks:
                process.start()
            for process in ranks:
                process.join(max(0.1, began + 90 - time.monotonic()))
            begun = [float(file.read_text()) for file in Path(folder).glob("*.began")]
            seconds = time.monotonic() - max(begun, default=began)
            for process in ranks:
                process.kill()
                process.join()
            logs = [Path(folder, f"{rank}.log").read_text() for rank in range(RANKS)]
            ends = [Path(folder, f"{rank}.end").exists() for rank in range(RANKS)]
            return Ended([process.exitcode or 0 for process in ranks], logs, ends, seconds, Path(folder))

        yield start


@pytest.mark.parametrize("deed", ["nothing", "work_on"])
def test_a_run_that_goes_well_says_nothing(run: Callable[[str], Ended], deed: str):
    ended = run(deed)
    assert ended.codes == [0, 0, 0] and all(ended.ends) and ended.messages == [], ended.logs


@pytest.mark.parametrize(
    "deed, longest, said",
    [
        ("die", 8.0, f"rank 1 on {HOST} has died in phase score"),
        ("stop", 14.0, f"rank 1 on {HOST} gave no sign of life for [567] s (health.silence) in phase score"),
        (
            "sleep",
            14.0,
            f"rank 1 on {HOST} made no progress for [3456] s in phase score (limit 3 s, health.limits.score)",
        ),
    ],
)
def test_one_message_names_who_ended_the_run(run: Callable[[str], Ended], deed: str, longest: float, said: str):
    ended = run(deed)
    # Who is stopped is ended by its neighbours.
    assert ended.codes == [75, 75 if deed == "sleep" else -signal.SIGKILL, 75]
    assert not any(ended.ends) and ended.seconds < longest
    (message,) = ended.messages
    pattern = re.escape(said).replace(r"\[567\]", "[567]").replace(r"\[3456\]", "[3456]")
    assert re.match(f"megarl: {pattern}", message), message
    assert "start again with resume=auto" in message
    if deed != "die":
        assert re.search(r"rank [02] waits in barrier at ", message)
        (stacks,) = ended.folder.glob("hang-*")
        found = {file.name: file.read_text() for file in stacks.iterdir()}
        assert {"rank_0000.txt", "rank_0002.txt"} <= found.keys()
        assert "waits for other ranks in barrier" in found["rank_0002.txt"] and "in behave" in found["rank_0002.txt"]
    if deed == "sleep":
        assert "in sleep" in found["rank_0001.txt"]


@pytest.mark.parametrize("deed, phase", [("first_stops", "score"), ("first_stops_at_once", "generate")])
def test_a_store_that_does_not_answer_is_a_hang_of_its_host(run: Callable[[str], Ended], deed: str, phase: str):
    ended = run(deed)
    assert ended.codes == [-signal.SIGKILL, 75, 75] and ended.seconds < 14
    (message,) = ended.messages
    assert re.match(
        rf"megarl: rank 1 on {HOST} in phase {phase} had no answer from the ranks' store at 127.0.0.1:\d+ for \d s "
        r"\(health.silence\): rank 0's host hangs, is gone or is cut off\.",
        message,
    )
    assert (ended.folder / "hang-store" / "rank_0002.txt").exists()


def test_an_error_of_one_rank_ends_all_and_is_said_once(run: Callable[[str], Ended]):
    ended = run("fail")
    assert ended.codes == [1, 1, 1] and ended.seconds < 8
    (message,) = ended.messages
    assert message == (
        f"megarl: rank 1 on {HOST} failed in phase score with ValueError: no such thing; its log has the traceback"
    )
    assert "Traceback" in ended.logs[1] and "in fail" in ended.logs[1] and "Traceback" not in ended.logs[0]


def test_an_error_of_all_ranks_is_said_once(run: Callable[[str], Ended]):
    ended = run("refuse")
    assert ended.codes == [2, 2, 2]
    assert ended.messages == ["megarl: x=1: must not be. Fix: leave it."]
    assert sum("said: True" in log for log in ended.logs) == 1


def test_ranks_that_wait_for_each_other_are_a_deadlock(run: Callable[[str], Ended]):
    ended = run("wait_crosswise")
    assert not any(ended.ends) and ended.seconds < 14
    (message,) = ended.messages
    assert re.match(r"megarl: all ranks wait for each other in phase push; ranks 0, 1, 2 on \S+ in \w+ at ", message)


def test_what_one_rank_is_asked_all_ranks_do(run: Callable[[str], Ended]):
    ended = run("stop_one")
    assert ended.codes == [0, 0, 0], ended.logs
    assert ended.messages == []
