"""The pre-flight: what each finding says, and that real ranks come to it; one whose host, folder or link is bad is "
"named."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from config_case import write_case
from ports import free_port
from torch.multiprocessing import get_context

from megarl.config.cluster import GIB
from megarl.config.health import PreflightSettings
from megarl.config.load import load_config
from megarl.config.schema import RunConfig
from megarl.errors import MegarlError
from megarl.health import facts as own_facts
from megarl.health import links as links_module
from megarl.health import preflight as module
from megarl.health.preflight import preflight
from megarl.health.readiness import Gpu, Link, RankFacts, broken_rules, slow_links
from megarl.parallel.bootstrap import World

SETTINGS = PreflightSettings()
HOST = socket.gethostname()


def facts(ranks: int, per_host: int = 2, gpus: bool = False) -> list[RankFacts]:
    """Ranks that are ready, on hosts gpu01, gpu02, ..."""
    return [
        RankFacts(
            rank=rank,
            host=f"gpu{rank // per_host + 1:02d}",
            node=rank // per_host,
            versions={"python": "3.11.7", "torch": "2.8.0", "transformer-engine": None},
            config_hash="aaaa",
            directory="/shared/runs/a",
            sees_directory=True if rank % per_host == 0 else None,
            clock=(0.001, 0.0001) if rank % per_host == 0 else None,
            disk_free=50 * GIB,
            shared_memory_free=GIB,
            gpu=Gpu("H100", f"id{rank}", 79 * GIB, 80 * GIB) if gpus else None,
        )
        for rank in range(ranks)
    ]


def changed(found: list[RankFacts], *ranks: int, **changes: Any) -> list[RankFacts]:
    return [replace(fact, **changes) if fact.rank in ranks else fact for fact in found]


def said_of(found: list[RankFacts], settings: PreflightSettings = SETTINGS) -> list[str]:
    return [str(refusal) for refusal in broken_rules(found, settings)]


OTHER_TORCH = {"python": "3.11.7", "torch": "2.7.1", "transformer-engine": None}
WITH_ENGINE = {"python": "3.11.7", "torch": "2.8.0", "transformer-engine": "2.5"}
SMALL = Gpu("A100", "id5", 40 * GIB, 40 * GIB)


@pytest.mark.parametrize(
    "found, said",
    [
        (
            changed(facts(8), 4, 5, versions=OTHER_TORCH),
            "torch 2.7.1 on ranks 4-5 on gpu03: all ranks must have the same, and 6 of 8 have 2.8.0. Fix: install the "
            "same torch on all hosts, or exclude what differs: sbatch --exclude=gpu03.",
        ),
        (
            changed(facts(4), 2, 3, versions=OTHER_TORCH),
            "torch 2.8.0 on ranks 0-1 on gpu01 and 2.7.1 on ranks 2-3 on gpu02: all ranks must have the same. Fix: "
            "install the same torch on all hosts.",
        ),
        (
            changed(facts(2, 1), 1, versions=WITH_ENGINE),
            "transformer-engine missing on rank 0 on gpu01 and 2.5 on rank 1 on gpu02: all ranks must have the same. "
            "Fix: install the same transformer-engine on all hosts.",
        ),
        (
            changed(facts(4, 1), 3, config_hash="bbbb"),
            "configuration bbbb on rank 3 on gpu04: all ranks must run the same configuration, and 3 of 4 have aaaa. "
            "Fix: start all ranks with the same file and the same key=value arguments.",
        ),
        (
            changed(facts(4), 0, directory_problem="Permission denied"),
            "run directory /shared/runs/a on gpu01: cannot be written (Permission denied). Fix: give runs_dir a folder "
            "that can be written to.",
        ),
        (
            changed(facts(4), 2, sees_directory=False, directory="/home/x/runs/a"),
            "run directory /home/x/runs/a on rank 2 on gpu02: is not the one that rank 0 on gpu01 writes to "
            "(/shared/runs/a). Fix: put runs_dir on a file system that all hosts share, and start in the same folder "
            "on all of them.",
        ),
        (
            changed(facts(4), 0, disk_free=GIB // 2),
            "0.50 GiB free for run directory /shared/runs/a: must be at least 1 GiB (health.preflight.disk_free_gib). "
            "Fix: free some space, or put runs_dir on another file system.",
        ),
        (
            changed(facts(6), 4, clock=(-75.0, 0.01)),
            "clock of gpu03 75.0 s behind the others: clocks may differ by 60 s (health.preflight.clock_skew). Fix: "
            "set it by NTP (timedatectl shows whether it is), or exclude the host: sbatch --exclude=gpu03.",
        ),
        (
            # Rank 0's own clock is the one that is off.
            changed(facts(8), 2, 4, 6, clock=(75.0, 0.01)),
            "clock of gpu01 75.0 s behind the others: clocks may differ by 60 s (health.preflight.clock_skew). Fix: "
            "set it by NTP (timedatectl shows whether it is), or exclude the host: sbatch --exclude=gpu01.",
        ),
        (
            changed(facts(4), 2, clock=(75.0, 0.01)),
            "clock of gpu02 75.0 s ahead of that of gpu01: clocks may differ by 60 s (health.preflight.clock_skew). "
            "Fix: set the clocks by NTP (timedatectl shows whether they are).",
        ),
        (
            changed(facts(4, gpus=True), 3, gpu=Gpu("H100", "id3", 31 * GIB, 80 * GIB)),
            "31.0 of 80.0 GiB free on the GPU of rank 3 on gpu02: must be at least 90% before the run starts "
            "(health.preflight.gpu_free_share). Fix: end the process that holds the rest (nvidia-smi shows it), or "
            "exclude the host: sbatch --exclude=gpu02.",
        ),
        (
            changed(facts(4, gpus=True), 3, gpu=Gpu("H100", "id2", 79 * GIB, 80 * GIB)),
            "ranks 2 and 3 on gpu02 on one GPU: each rank must have a GPU of its own. Fix: start as many processes per "
            "host as it has GPUs.",
        ),
        (
            changed(facts(6, gpus=True), 5, gpu=SMALL),
            "GPU A100 of 40 GiB on rank 5 on gpu03: all ranks must have the same, as one that is slower or smaller "
            "holds up the rest, and 5 of 6 have H100 of 80 GiB. Fix: ask for one kind of GPU (sbatch --constraint), or "
            "exclude what differs: sbatch --exclude=gpu03.",
        ),
        (
            changed(facts(4, gpus=True), 2, 3, shared_memory_free=64 << 20),
            "64 MiB free in /dev/shm of gpu02: must be at least 64 MiB for each of its 2 processes "
            "(health.preflight.shared_memory_mib). Fix: remove what earlier jobs left there, or mount it larger "
            "(--shm-size).",
        ),
    ],
)
def test_what_forbids_a_start_is_one_sentence(found: list[RankFacts], said: str) -> None:
    assert said_of(found) == [said]


@pytest.mark.parametrize(
    "found",
    [
        facts(8),
        facts(8, gpus=True),
        facts(1),
        # Within the bounds, or not known to be outside them.
        changed(facts(4), 2, clock=(75.0, 20.0)),
        changed(facts(6), 4, clock=(75.0, 20.0)),
        changed(facts(6), 4, clock=(59.0, 0.01)),
        changed(facts(4), 2, disk_free=0),
        changed(facts(4), 2, 3, shared_memory_free=0),
        changed(facts(4), 0, disk_free=None),
    ],
)
def test_what_is_well_may_start(found: list[RankFacts]) -> None:
    assert said_of(found) == []


def test_a_thousand_ranks_are_judged_at_once() -> None:
    found = changed(facts(1024, 8, gpus=True), *range(64, 72), versions=OTHER_TORCH)
    start = time.monotonic()
    assert said_of(found)[0].startswith(
        "torch 2.7.1 on ranks 64-71 on gpu09: all ranks must have the same, and 1016 of 1024"
    )
    speeds = [1e-3 if rank == 72 else 1.0 for rank in range(1024)]
    assert len(list(slow_links(ring(speeds), facts(1024, 8), SETTINGS))) == 1
    assert time.monotonic() - start < 1.0


def ring(speeds: list[float]) -> list[Link]:
    """`speeds[r]` is what rank r receives with, from the one before."""
    return [Link((rank - 1) % len(speeds), rank, speed) for rank, speed in enumerate(speeds)]


FIX = "exclude the host: sbatch --exclude="


@pytest.mark.parametrize(
    "speeds, per_host, gpus, said",
    [
        ([1.0] * 8, 1, False, []),
        ([1.0, 0.3, 1.0, 1.0], 1, False, []),
        # On the CPU what is within a host is not judged.
        ([1.0, 0.01, 1.0, 5.0], 4, False, []),
        (
            [1.0, 1.0, 0.1, 1.0, 1.0, 1.1],
            1,
            False,
            [
                "link from rank 1 on gpu02 to rank 2 on gpu03 with 0.1 GB/s: below 25% of the 1 GB/s that is usual "
                "between hosts (health.preflight.slow_link_share). Fix: look at the network between gpu02 and gpu03, "
                "or exclude one: sbatch --exclude=gpu03."
            ],
        ),
        (
            # Of three links two are slow: the fastest says what is usual.
            [2.0, 0.1, 0.12],
            1,
            False,
            [
                "host gpu02 with links of 0.1 and 0.12 GB/s (rank 0 to 1, rank 1 to 2): below 25% of the 2 GB/s that "
                f"is usual between hosts (health.preflight.slow_link_share). Fix: {FIX}gpu02."
            ],
        ),
        (
            [90.0, 90.0, 90.0, 9.0, 90.0, 90.0, 90.0, 90.0],
            8,
            True,
            [
                "link from rank 2 on gpu01 to rank 3 on gpu01 with 9 GB/s: below 25% of the 90 GB/s that is usual "
                f"within hosts (health.preflight.slow_link_share). Fix: {FIX}gpu01."
            ],
        ),
    ],
)
def test_slow_links_and_hosts_are_named(speeds: list[float], per_host: int, gpus: bool, said: list[str]) -> None:
    found = slow_links(ring(speeds), facts(len(speeds), per_host, gpus), SETTINGS)
    assert [str(refusal) for refusal in found] == said


def test_versions_cover_what_ranks_must_share() -> None:
    found = own_facts.versions()
    assert {"python", "megarl", "megarl's source", "torch", "megatron-core", "vllm"} <= found.keys()
    assert found["torch"] == torch.__version__ and found["megatron-core"]


Work = Callable[[RunConfig, World], str]


def run_ranks(folder: Path, nodes: tuple[int, ...], work: Work, **settings: Any) -> list[str]:
    """What `work` says on each of `len(nodes)` real ranks; `nodes[r]` is the host that rank r is taken to be on."""
    write_case(folder)
    overrides = [f"health.preflight.{key}={value}" for key, value in settings.items()]
    config = load_config(folder / "run.yaml", [f"runs_dir={folder}/runs", *overrides])
    port, context = free_port(), get_context("fork")
    processes = [
        context.Process(target=_rank, args=(rank, nodes, port, config, folder, work), daemon=True)
        for rank in range(len(nodes))
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        process.kill()
    files = [folder / f"said.{rank}" for rank in range(len(nodes))]
    return [file.read_text() if file.exists() else "nothing" for file in files]


def _rank(rank: int, nodes: tuple[int, ...], port: int, config: RunConfig, folder: Path, work: Work) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=len(nodes))
    hosts = tuple(f"node{node}" for node in nodes)
    world = World(rank, len(nodes), 0, nodes.count(nodes[rank]), nodes, torch.device("cpu"), hosts)
    try:
        said = work(config, world)
    except MegarlError as error:
        said = f"{type(error).__name__}: {error}"
    (folder / f"said.{rank}.part").write_text(said)
    (folder / f"said.{rank}.part").rename(folder / f"said.{rank}")
    os._exit(0)


def directory_of(config: RunConfig) -> Path:
    return Path(config.runs_dir) / config.name


def _passes(config: RunConfig, world: World) -> str:
    report = preflight(config, world, directory_of(config))
    if world.rank == 0:
        report.write(directory_of(config) / "preflight.json")
    return report.status_line()


def test_ranks_that_are_well_pass_in_a_moment(tmp_path: Path) -> None:
    said = run_ranks(tmp_path, (0, 0, 1, 1), _passes, slow_link_share=0)
    assert all(line.startswith("pre-flight: 4 ranks on 2 hosts, slowest link ") for line in said), said
    table = json.loads((tmp_path / "runs/case/preflight.json").read_text())
    assert table["ranks"] == 4 and table["seconds"] < 20
    assert [link["from"] for link in table["links"]] == [[3, "node1"], [0, "node0"], [1, "node0"], [2, "node1"]]
    assert all(0.001 < link["gb_per_second"] < 1000 for link in table["links"])
    assert table["hosts"]["node1"]["ranks"] == [2, 3] and abs(table["hosts"]["node1"]["clock_ahead"]) < 1
    assert [file.name for file in (tmp_path / "runs/case").iterdir()] == ["preflight.json"]


@pytest.mark.parametrize("size", [1, 3])
def test_any_number_of_ranks_pass(tmp_path: Path, size: int) -> None:
    said = run_ranks(tmp_path, (0,) * size, _passes)
    assert all(line.startswith(f"pre-flight: {size} rank") for line in said), said
    assert not any("slowest link 0 GB/s" in line for line in said)


def _elsewhere(config: RunConfig, world: World) -> str:
    module.SEEN_WITHIN = 0.5
    own = directory_of(config)
    if world.rank == 2:
        own = own.parent.parent / "elsewhere" / "case"
        own.mkdir(parents=True)
    preflight(config, world, own)
    return "passed"


def test_a_run_directory_that_is_not_shared_is_refused_by_all(tmp_path: Path) -> None:
    said = run_ranks(tmp_path, (0, 0, 1), _elsewhere)
    assert (
        said
        == [
            f"Refusal: run directory {tmp_path}/elsewhere/case on rank 2 on node1: is not the one that rank 0 on node0 "
            f"writes to ({tmp_path}/runs/case). Fix: put runs_dir on a file system that all hosts share, and start in "
            "the same folder on all of them."
        ]
        * 3
    )
    assert not (tmp_path / "runs").exists()


def _ahead(config: RunConfig, world: World) -> str:
    if world.rank == 1:
        fake: Any = SimpleNamespace(time=lambda: time.time() + 75, perf_counter=time.perf_counter)
        links_module.time = fake
    preflight(config, world, directory_of(config))
    return "passed"


def test_a_clock_that_is_off_is_measured(tmp_path: Path) -> None:
    said = run_ranks(tmp_path, (0, 1, 2), _ahead, slow_link_share=0)
    assert (
        said
        == [
            "Refusal: clock of node1 75.0 s ahead of the others: clocks may differ by 60 s "
            "(health.preflight.clock_skew). Fix: set it by NTP (timedatectl shows whether it is), or exclude the host: "
            "sbatch --exclude=node1."
        ]
        * 3
    )


def _other_config(config: RunConfig, world: World) -> str:
    if world.rank == 1:
        config = config.model_copy(update={"seed": config.seed + 1})
    preflight(config, world, directory_of(config))
    return "passed"


def test_a_rank_with_another_configuration_is_refused(tmp_path: Path) -> None:
    for said in run_ranks(tmp_path, (0, 0, 0), _other_config):
        assert (
            said.startswith("Refusal: configuration ") and " on rank 1 on node0: all ranks must run the same " in said
        )


def _not_writable(config: RunConfig, world: World) -> str:
    preflight(config, world, Path(config.runs_dir) / "file" / "run")
    return "passed"


def test_a_run_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/file").write_text("")
    for said in run_ranks(tmp_path, (0, 1), _not_writable):
        assert said.startswith(
            f"Refusal: run directory {tmp_path}/runs/file/run on node0: cannot be written (Not a dir"
        )


def _late(config: RunConfig, world: World) -> str:
    if world.rank == 1:
        time.sleep(6)
    preflight(config, world, directory_of(config))
    return "passed"


def test_a_rank_that_does_not_get_through_is_named(tmp_path: Path) -> None:
    said = run_ranks(tmp_path, (0, 0, 0), _late, limit=1)
    assert (
        said[0]
        == said[2]
        == (
            "Interrupted: rank 1 of 3 did not come within 1 s to the pre-flight (health.preflight.limit); there came "
            f"ranks 0, 2 on {HOST}: see the log and the host of what is missing, then start again with resume=auto"
        )
    )


def _dies(config: RunConfig, world: World) -> str:
    if world.rank == 1:

        def die(*_: object) -> None:
            os._exit(1)

        module.gather_all = die
    # Where a watchdog knows whose end it was, it has the word.
    config = config.model_copy(update={"health": config.health.model_copy(update={"watchdog": False})})
    preflight(config, world, directory_of(config))
    return "passed"


def test_a_rank_that_dies_among_the_others_ends_them(tmp_path: Path) -> None:
    start = time.monotonic()
    said = run_ranks(tmp_path, (0, 0), _dies)
    assert time.monotonic() - start < 20
    assert said[0].startswith("Interrupted: rank 0 on node0 lost the connection to other ranks in the pre-flight (")
