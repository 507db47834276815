"""Joining: every launcher's place is read, and a rank that does not come is named in bounded time."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ports import free_port
from torch._C._distributed_c10d import TCPStore
from torch.multiprocessing import get_context

from megarl.errors import Interrupted, MegarlError, Refusal
from megarl.parallel import bootstrap, cpu_platform, roll_call
from megarl.parallel import place as place_module
from megarl.parallel.place import Place, expand_hosts, find_place, place_over_mpi

ROOT = Path(__file__).resolve().parent.parent
MPIRUN = Path(sys.executable).parent / "mpirun"
HOST = socket.gethostname()
LIMIT = 2.0
#: The environment without what a launcher of the tests themselves would have set.
LAUNCHERS = ("SLURM_", "OMPI_", "PMI_", "PMIX_", "PRTE_", "TORCHELASTIC_")
CLEAN = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHERS) and k not in ("RANK", "WORLD_SIZE")}

SLURM = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "70001"}
NODES = {"SLURM_JOB_NODELIST": "gpu[07-08]"}


@pytest.mark.parametrize(
    "environment, place",
    [
        ({}, None),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", **SLURM}, Place(3, 4, 1, None, None)),
        ({**SLURM, **NODES}, Place(5, 8, 1, "gpu07", "30001")),
        ({**SLURM, **NODES, "SLURM_STEP_ID": "1"}, Place(5, 8, 1, "gpu07", "31010")),
        ({**SLURM, **NODES, "MASTER_ADDR": "b", "MASTER_PORT": "7"}, Place(5, 8, 1, "b", "7")),
        ({**SLURM, **NODES, "PMIX_RANK": "5"}, Place(5, 8, 1, "gpu07", "30001", mpi=True)),
        ({**SLURM, **NODES, "SLURM_NODEID": "2"}, Place(5, 8, 1, "gpu07", "30001", node=2)),
        # MPICH's mpirun in a batch job, whose own task is number 0.
        ({**SLURM, "SLURM_PROCID": "0", "PMI_RANK": "2", "PMI_SIZE": "3"}, Place(2, 3, 1, None, None, mpi=True)),
        (
            {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
            Place(1, 2, 1, None, None, mpi=True),
        ),
        # Where Slurm's first host is a guess, which need not be that of MPI's rank 0.
        (
            {**SLURM, **NODES, "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"},
            Place(1, 2, 0, "gpu07", "30001", mpi=True, guessed=True),
        ),
        (
            {**NODES, "MASTER_ADDR": "b", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"},
            Place(1, 2, 0, "b", "20000", mpi=True),
        ),
        # A batch script, and a step of one task.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, None),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"}, None),
    ],
)
def test_the_place_is_what_the_launcher_says(environment: dict[str, str], place: Place | None) -> None:
    assert find_place(environment) == place


@pytest.mark.parametrize(
    "nodelist, hosts",
    [
        ("", []),
        ("gpu01", ["gpu01"]),
        ("gpu[07-09,12],x1", ["gpu07", "gpu08", "gpu09", "gpu12", "x1"]),
        ("a[9-11]-ib,b[1,003]", ["a9-ib", "a10-ib", "a11-ib", "b1", "b003"]),
        ("rack[1-2]node[1-3]", ["rack1node1", "rack1node2", "rack1node3", "rack2node1", "rack2node2", "rack2node3"]),
        ("r[1-2]n[08,10]x,y", ["r1n08x", "r1n10x", "r2n08x", "r2n10x", "y"]),
    ],
)
def test_node_lists_of_slurm_are_expanded(nodelist: str, hosts: list[str]) -> None:
    assert expand_hosts(nodelist) == hosts


@pytest.mark.parametrize("nodelist", ["gpu[1-", "gpu[a-b]", "gpu]1[", "a b", "gpu[]", "gpu[1-2-3]"])
def test_what_is_no_node_list_is_refused(nodelist: str) -> None:
    with pytest.raises(Refusal, match=r"of Slurm: must be host names with numbers in brackets"):
        expand_hosts(nodelist)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"RANK": "abc", "WORLD_SIZE": "2"},
            "RANK=abc in the environment: must be a whole number. "
            "Fix: unset RANK, or let what sets it (torchrun, srun, mpirun, a profile) set it right.",
        ),
        ({"RANK": "0", "WORLD_SIZE": "2 "}, "WORLD_SIZE=2  in the environment: must be a whole number"),
        ({"RANK": "abc"}, "RANK=abc in the environment, without WORLD_SIZE: must come with the number of processes"),
        (
            {"OMPI_COMM_WORLD_RANK": "", "OMPI_COMM_WORLD_SIZE": "2"},
            "OMPI_COMM_WORLD_RANK= in the environment: must be",
        ),
        ({"SLURM_PROCID": "x", "SLURM_STEP_NUM_TASKS": "2"}, "SLURM_PROCID=x in the environment: must be a whole"),
        (
            {"RANK": "2", "WORLD_SIZE": "2"},
            "rank 2 of 2 processes, local rank 0: must be a place that a launcher gives",
        ),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "rank -1 of 2 processes, local rank 0: must be a place"),
    ],
)
def test_an_environment_that_no_launcher_makes_is_named(environment: dict[str, str], message: str) -> None:
    with pytest.raises(Refusal) as caught:
        find_place(environment)
    assert str(caught.value).startswith(message)


def test_mpi_is_not_touched_where_no_mpi_launcher_started_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def touched() -> None:
        raise AssertionError("MPI was touched")

    with monkeypatch.context() as patch:
        patch.setattr(place_module, "_load_mpi", touched)
        for place in (Place(5, 8, 1, "gpu07", "30001"), Place(0, 1, 0, None, None, mpi=True)):
            assert place_over_mpi(place, 1.0) is place
    # And without mpi4py what the environment says holds.
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    mpi = Place(1, 2, 1, "gpu07", "30001", mpi=True)
    assert place_over_mpi(mpi, 1.0) is mpi


PRINT_PLACE = """
import os, sys, time
from megarl.errors import MegarlError
from megarl.parallel.place import find_place, place_over_mpi
place = find_place(os.environ | {"SLURM_JOB_NODELIST": os.environ.get("NODELIST", "")})
if place.rank == int(os.environ.get("LATE", "-1")):
    time.sleep(20)
try:
    sys.stdout.write(f"{place_over_mpi(place, float(os.environ.get('LIMIT', '60')))}\\n")
except MegarlError as error:
    sys.exit(str(error))
"""


def under_mpirun(processes: int, **environment: str) -> subprocess.CompletedProcess[str]:
    if not MPIRUN.is_file():
        pytest.skip("no mpirun in the virtual environment")
    options = ["--allow-run-as-root", "--oversubscribe", "-n", str(processes)]
    return subprocess.run(
        [MPIRUN, *options, sys.executable, "-c", PRINT_PLACE],
        env=CLEAN | {"PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("hosts", ["", "far[1-2]"])
def test_mpi_gives_rank_size_layout_and_a_place_to_meet(hosts: str) -> None:
    """Also in a Slurm job, of which another host is the first."""
    done = under_mpirun(4, NODELIST=hosts)
    assert done.returncode == 0, done.stderr
    found = [eval(line) for line in done.stdout.splitlines()]
    ports = {place.port for place in found}
    assert len(ports) == 1 and int(ports.pop()) > 1023
    assert sorted((p.rank, p.size, p.local_rank, p.address, p.node) for p in found) == [
        (rank, 4, rank, "127.0.0.1", 0) for rank in range(4)
    ]


def test_an_mpi_that_knows_another_size_is_refused() -> None:
    """As under the mpirun of another MPI: each process would take itself for the only one."""
    if not MPIRUN.is_file():
        pytest.skip("no MPI in the virtual environment")
    alone = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}
    environment = CLEAN | {"PYTHONPATH": str(ROOT), **alone}
    done = subprocess.run([sys.executable, "-c", PRINT_PLACE], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "2 processes of which MPI knows 1: must find each other. Fix: start them by the mpirun of the MPI that mpi4py "
        "was built for, or by srun with --mpi=pmix or --mpi=none."
    )


def test_a_rank_that_does_not_come_to_mpi_is_waited_for_no_longer_than_the_limit() -> None:
    start = time.monotonic()
    done = under_mpirun(2, LATE="1", LIMIT="3")
    assert time.monotonic() - start < 15
    assert done.returncode != 0
    assert "Timeout (0:00:03)!" in done.stderr and "in place_over_mpi" in done.stderr


Work = Callable[[Place], None]


def place_of(rank: int, size: int, port: int) -> Place:
    return Place(rank, size, rank, "127.0.0.1", str(port))


KEPT: list[Any] = []


def meet(place: Place) -> None:
    # Rank 0's is the store itself, which lives as long as this.
    KEPT.append(roll_call.meet(place, LIMIT))


def end_of(places: list[Place], work: Work = meet, **environment: str) -> list[tuple[float, str]]:
    """Run `work` in one process per place; how each ended: after how many seconds, and the error's class and text."""
    with tempfile.TemporaryDirectory() as folder:
        context = get_context("fork")
        processes = [
            context.Process(target=_in_process, args=(work, place, f"{folder}/{n}", environment), daemon=True)
            for n, place in enumerate(places)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
            process.kill()
        found = []
        for n in range(len(places)):
            file = Path(folder, str(n))
            seconds, text = file.read_text().split(" ", 1) if file.exists() else ("inf", "none")
            found.append((float(seconds), text))
        return found


def _in_process(work: Work, place: Place, file: str, environment: dict[str, str]) -> None:
    torch.set_num_threads(1)
    for name in [name for name in os.environ if name.startswith(("SLURM_", "TORCHELASTIC_"))]:
        del os.environ[name]
    os.environ.update(environment)
    start = time.monotonic()
    try:
        work(place)
        said = "came"
    except MegarlError as error:
        said = f"{type(error).__name__}: {error}"
    Path(f"{file}.part").write_text(f"{time.monotonic() - start} {said}")
    Path(f"{file}.part").rename(file)
    if place.rank == 0 and said == "came":
        # It is the host of the store: it stays until the others have read that all came.
        until = time.monotonic() + 10
        while len(list(Path(file).parent.glob("?"))) < place.size and time.monotonic() < until:
            time.sleep(0.05)
    os._exit(0)


def test_all_come() -> None:
    port = free_port()
    assert [said for _, said in end_of([place_of(rank, 4, port) for rank in range(4)])] == ["came"] * 4


def test_the_missing_are_named_alike_by_all_that_came() -> None:
    port = free_port()
    found = end_of([place_of(rank, 6, port) for rank in (0, 1, 4)])
    for seconds, said in found:
        assert LIMIT - 0.1 < seconds < LIMIT + 3
        assert said == (
            f"Interrupted: ranks 2-3, 5 of 6 did not come within 2 s (health.join_limit); there came ranks 0-1, 4 "
            f"on {HOST}: see the log and the host of what is missing, then start again with resume=auto"
        )
    assert Interrupted("").exit_code == 75


def test_hosts_of_the_slurm_step_that_nobody_came_from_are_named() -> None:
    port = free_port()
    (_, said), _ = end_of(
        [place_of(rank, 3, port) for rank in range(2)], SLURM_JOB_NODELIST=f"{HOST.split('.')[0]},gpu[07-08]"
    )
    assert "rank 2 of 3 did not come within 2 s (health.join_limit), none from gpu07, gpu08; there came" in said


def test_rank_0_can_be_the_one_that_is_missing_where_torchrun_holds_the_store() -> None:
    store = TCPStore("127.0.0.1", 0, 3, True, wait_for_workers=False)
    found = end_of([place_of(rank, 3, store.port) for rank in (1, 2)], TORCHELASTIC_USE_AGENT_STORE="True")
    for _, said in found:
        assert said.startswith(
            "Interrupted: rank 0 of 3 did not come within 2 s (health.join_limit); there came ranks 1-2"
        )


def test_torchruns_store_is_not_opened_by_rank_0() -> None:
    port = free_port()
    ((_, said),) = end_of([place_of(0, 2, port)], TORCHELASTIC_USE_AGENT_STORE="True")
    assert said.startswith(
        f"Interrupted: rank 0 of 2 on {HOST} could not reach the first host's torchrun at 127.0.0.1:{port} w"
    )


def test_a_store_that_outlives_an_attempt_does_not_answer_for_the_next() -> None:
    store = TCPStore("127.0.0.1", 0, 2, True, wait_for_workers=False)
    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    places = [place_of(rank, 2, store.port) for rank in range(2)]
    assert [said for _, said in end_of(places, meet, **agent)] == ["came", "came"]
    (_, said), *_ = end_of(places[:1], meet, TORCHELASTIC_RESTART_COUNT="1", **agent)
    assert said.startswith("Interrupted: rank 1 of 2 did not come")


def test_a_process_can_join_twice() -> None:
    def twice(place: Place) -> None:
        os.environ.update(RANK=str(place.rank), WORLD_SIZE="2", LOCAL_RANK="0")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(place.port))
        cpu_platform.activate = lambda: None
        for _ in range(2):
            world = bootstrap.join(join_limit=10.0)
            assert (world.rank, world.size, world.hosts) == (place.rank, 2, (HOST, HOST))
            assert (world.local_size, world.node_of_rank) == (2, (0, 0))
            bootstrap.leave()

    store = TCPStore("127.0.0.1", 0, 2, True, wait_for_workers=False)
    found = end_of(
        [place_of(rank, 2, store.port) for rank in range(2)], work=twice, TORCHELASTIC_USE_AGENT_STORE="True"
    )
    assert [said for _, said in found] == ["came", "came"]


def test_the_limit_of_joining_is_not_that_of_later_collectives() -> None:
    def late(place: Place) -> None:
        os.environ.update(RANK=str(place.rank), WORLD_SIZE="2", LOCAL_RANK="0")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(place.port))
        cpu_platform.activate = lambda: None
        bootstrap.join(timeout_minutes=0.05, join_limit=60.0)
        if place.rank == 1:
            time.sleep(8)
        try:
            dist.all_reduce(torch.zeros(1))
        except RuntimeError:
            raise MegarlError("ran out") from None

    port = free_port()
    found = end_of([place_of(rank, 2, port) for rank in range(2)], work=late)
    assert found[0][1] == "MegarlError: ran out" and 2.5 < found[0][0] < 7


def test_a_rank_that_two_processes_have_is_refused_by_all() -> None:
    port = free_port()
    for _, said in end_of([place_of(rank, 3, port) for rank in (0, 1, 1)]):
        assert re.fullmatch(
            rf"Refusal: rank 1 twice, process \d+ on {HOST} and process \d+ on {HOST}: each rank must be one "
            r"process\. Fix: give each host a number of its own \(torchrun --node-rank\), each process its own "
            r"RANK, and each run its own MASTER_PORT\.",
            said,
        )


def test_a_store_that_is_not_there_is_one_sentence() -> None:
    port = free_port()
    ((seconds, said),) = end_of([place_of(1, 2, port)])
    assert LIMIT - 0.1 < seconds < LIMIT + 1
    assert said == (
        f"Interrupted: rank 1 of 2 on {HOST} could not reach rank 0 at 127.0.0.1:{port} within 2 s (health.join_limit; "
        "Connection refused): see that it was started and that no firewall is between, correct MASTER_ADDR and "
        "MASTER_PORT if they are wrong, and start again with resume=auto"
    )


def test_an_address_that_no_one_has_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also from rank 0, which opens the store there, and for what can be no name."""
    monkeypatch.setattr(roll_call, "NAME_LIMIT", 1.0)
    for address in ("no-such-host.invalid", f"{'x' * 70}.invalid"):
        for seconds, said in end_of([Place(rank, 2, rank, address, "29500") for rank in range(2)]):
            assert 0.9 < seconds < 10
            assert re.fullmatch(
                rf"Refusal: MASTER_ADDR={address}, rank 0's host: must be a name or an address that {HOST} knows, and "
                r"was not within 1 s \([^()]+\)\. Fix: correct it, or have the host's name resolved "
                r"\(/etc/hosts, DNS\)\.",
                said,
            )
    assert Refusal("", "", "").exit_code == 2
    # Nothing of torch's own attempts.
    assert "socket" not in capfd.readouterr().err


def test_something_else_at_the_port_is_not_waited_for_without_end() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        ((seconds, said),) = end_of([place_of(1, 2, listener.getsockname()[1])])
    assert seconds < LIMIT + 3
    assert "(health.join_limit; what listens there does not answer): see that it was" in said


def test_a_port_that_megarl_chose_is_held_until_the_store_has_it() -> None:
    listener = place_module._listen()
    port = listener.getsockname()[1]
    with pytest.raises(OSError, match="in use"):
        socket.create_server(("", port))
    places = [replace(place_of(0, 2, port), listener=listener), place_of(1, 2, port)]
    assert [said for _, said in end_of(places)] == ["came"] * 2


def test_a_process_alone_lets_the_system_choose_as_the_store_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert bootstrap._meeting_place(2.0) == Place(0, 1, 0, "127.0.0.1", "0")


def test_a_port_that_is_taken_is_refused() -> None:
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        port = listener.getsockname()[1]
        ((_, said),) = end_of([place_of(0, 2, port)])
    assert said.startswith(
        f"Refusal: MASTER_PORT={port}: must be free for rank 0 on {HOST} (The server socket has failed"
    )
    assert said.endswith("Fix: set MASTER_PORT to a free port, the same on all hosts.")


def test_the_end_of_the_stores_host_is_one_sentence() -> None:
    def host_dies(place: Place) -> None:
        if place.rank == 0:
            store = roll_call.connect(place, LIMIT)
            time.sleep(0.5)
            del store
            os.kill(os.getpid(), signal.SIGKILL)
        roll_call.meet(place, 20.0)

    port = free_port()
    _, (seconds, said) = end_of([place_of(rank, 3, port) for rank in range(2)], work=host_dies)
    assert seconds < 5
    assert said.startswith(
        f"Interrupted: rank 1 of 3 on {HOST} lost the connection to 127.0.0.1:{port} while the ranks"
    )


def test_who_is_missing_is_said_while_waiting(capfd: pytest.CaptureFixture[str]) -> None:
    def soon(place: Place) -> None:
        roll_call.FIRST_WORD = roll_call.NEXT_WORD = 0.7
        roll_call.meet(place, LIMIT)

    port = free_port()
    end_of([place_of(rank, 3, port) for rank in range(2)], work=soon)
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("megarl: ")]
    assert said == ["megarl: waiting for rank 2 of 3 to come"] * 2


def test_a_rank_without_an_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(Refusal, match=r"rank 1 of 2 without MASTER_ADDR: processes must know where to meet"):
        bootstrap.join()
