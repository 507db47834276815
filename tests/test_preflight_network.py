"""The pre-flight and joining over a real network between hosts that are apart: slow links and wrong interfaces."""

from __future__ import annotations

import os
import re
import socket
import time
from pathlib import Path

import pytest
import torch
from config_case import write_case
from hosts_apart import Hosts, hosts_apart, move_to
from torch.multiprocessing import get_context

from megarl.config.load import load_config
from megarl.config.schema import RunConfig
from megarl.errors import MegarlError
from megarl.health.preflight import preflight
from megarl.parallel import bootstrap, cpu_platform

PORT = "29511"
LIMIT = 12.0


def on_hosts(hosts: Hosts, folder: Path, interface: str | None = "eth0") -> list[str]:
    """What a rank on each host says of joining and the pre-flight."""
    config = load_config(write_case(folder), [f"runs_dir={folder}/runs", "health.preflight.message_mib=2"])
    context = get_context("fork")
    ranks = [
        context.Process(target=_rank, args=(rank, hosts, config, folder, interface), daemon=True)
        for rank in range(len(hosts.names))
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        process.kill()
    files = [folder / f"said.{rank}" for rank in range(len(ranks))]
    return [file.read_text() if file.exists() else "nothing" for file in files]


def _rank(rank: int, hosts: Hosts, config: RunConfig, folder: Path, interface: str | None) -> None:
    move_to(hosts.names[rank])
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(len(hosts.names)), LOCAL_RANK="0")
    os.environ.update(MASTER_ADDR=hosts.addresses[0], MASTER_PORT=PORT)
    os.environ.pop("GLOO_SOCKET_IFNAME", None)
    if interface is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = interface
    socket.gethostname = lambda: f"host{rank}"
    cpu_platform.activate = lambda: None
    try:
        world = bootstrap.join(join_limit=LIMIT)
        said = preflight(config, world, Path(config.runs_dir) / config.name).status_line()
    except MegarlError as error:
        said = f"{type(error).__name__}: {error}"
    (folder / f"said.{rank}.part").write_text(said)
    (folder / f"said.{rank}.part").rename(folder / f"said.{rank}")
    os._exit(0)


def test_hosts_with_a_good_network_pass(tmp_path: Path) -> None:
    with hosts_apart(3) as hosts:
        for said in on_hosts(hosts, tmp_path):
            assert said.startswith("pre-flight: 3 ranks on 3 hosts, slowest link "), said


def test_a_slow_link_is_named_with_both_ends(tmp_path: Path) -> None:
    with hosts_apart(3) as hosts:
        hosts.slow_down(1, "50mbit")
        for said in on_hosts(hosts, tmp_path):
            found = re.match(
                r"Refusal: link from rank 1 on host1 to rank 2 on host2 with ([\d.e-]+) GB/s: below 25%", said
            )
            assert found is not None, said
            assert 0.002 < float(found.group(1)) < 0.012
            assert said.endswith(
                "Fix: look at the network between host1 and host2, or exclude one: sbatch --exclude=host2."
            )


def test_a_host_whose_both_links_are_slow_is_named(tmp_path: Path) -> None:
    with hosts_apart(3) as hosts:
        hosts.slow_down(1, "50mbit")
        hosts.slow_down(1, "50mbit", inward=True)
        for said in on_hosts(hosts, tmp_path):
            assert said.startswith("Refusal: host host1 with links of 0.00"), said
            assert said.endswith("Fix: exclude the host: sbatch --exclude=host1.")


def test_ranks_that_cannot_reach_each_other_say_so_in_time(tmp_path: Path) -> None:
    with hosts_apart(2) as hosts:
        start = time.monotonic()
        said = on_hosts(hosts, tmp_path, interface="lo")
        assert time.monotonic() - start < LIMIT + 20
        for rank, one in enumerate(said):
            assert one.startswith(
                f"Interrupted: rank {rank} of 2 on host{rank} could not connect to the other ranks, though all of them "
                "came ("
            )
            assert "name the network between the hosts by GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME" in one


def test_hosts_are_gone_afterwards() -> None:
    with hosts_apart(1) as hosts:
        assert Path("/run/netns", hosts.names[0]).exists()
    assert not Path("/run/netns", hosts.names[0]).exists()
    with pytest.raises(FileNotFoundError):
        move_to(hosts.names[0])
