"""The push in a plan: its bytes against every rank's schedule, its seconds by hand, and the schedule as text."""

from __future__ import annotations

import json
from collections import Counter
from math import prod
from pathlib import Path

import pytest
from config_case import write_case
from reshard_worlds import Case
from test_cli import megarl
from test_plan_cli import CLUSTER

from megarl.config.cluster import Cluster
from megarl.config.load import load_config
from megarl.config.model_shape import read_model_shape
from megarl.rehearsal.push import push_traffic
from megarl.reshard.weight_map import hf_tensors
from megarl.reshard.wire import all_in

WORLD = 8


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run on 8 GPUs, two nodes of four; the working directory is its folder."""
    monkeypatch.chdir(tmp_path)
    write_case(
        tmp_path,
        parallel={"tensor": 2, "pipeline": 2, "processes": WORLD},
        rollout={"tensor": 2, "max_tokens": 64, "kv_cache_gib": 0.1},
        precision="bf16",
    )
    return tmp_path


def planned(folder: Path) -> tuple[Case, list]:
    """The same run as a case of the planner's own tests, and the plans of all its ranks."""
    config = load_config(folder / "run.yaml", [])
    shape = read_model_shape(config.model.path)
    case = Case(shape, config.parallel, config.rollout.tensor, False, WORLD, CLUSTER["gpus_per_node"])
    return case, case.plans(int(config.weights.bucket_mib * 2**20), all_in("bf16"))


def test_bytes_and_seconds_are_those_of_the_ranks_schedules(folder: Path):
    config = load_config(folder / "run.yaml", [])
    cluster = Cluster.model_validate(CLUSTER)
    push = push_traffic(config, read_model_shape(config.model.path), cluster, WORLD)
    case, plans = planned(folder)
    moved: Counter[tuple[str, int]] = Counter()
    for plan in plans:
        for transfer in plan.receives():
            link = "nvlink" if case.nodes[transfer.source] == case.nodes[transfer.target] else "network"
            moved[f"{link} in", transfer.target] += transfer.nbytes
            moved[f"{link} out", transfer.source] += transfer.nbytes
        moved["local", plan.rank] = sum(transfer.nbytes for transfer in plan.local())

    def of(kind: str) -> list[int]:
        return [moved[kind, rank] for rank in range(WORLD)]

    for link, found in (("nvlink", push.nvlink), ("network", push.network)):
        into, out = of(f"{link} in"), of(f"{link} out")
        assert (found.total, found.most_received, found.most_sent) == (sum(into), max(into), max(out))
        assert sum(into) > 0
    received = [near + far for near, far in zip(of("nvlink in"), of("network in"), strict=True)]
    assert push.received_bytes_max_rank == push.lower_bound_max_rank == max(received)
    assert push.copied_bytes == sum(of("local"))
    links = [
        max(
            max(moved["network in", rank], moved["network out", rank]) / CLUSTER["network_bytes_per_second"],
            max(moved["nvlink in", rank], moved["nvlink out", rank]) / CLUSTER["nvlink_bytes_per_second"],
        )
        + 2 * moved["local", rank] / CLUSTER["hbm_bytes_per_second"]
        for rank in range(WORLD)
    ]
    assert push.slowest_rank == links.index(max(links))
    assert push.messages == sum(len(one.messages) for one in plans[push.slowest_rank].rounds)
    assert push.rounds == len(plans[push.slowest_rank].rounds)
    assert push.gathered_bytes == 2 * sum(prod(dims) for dims in hf_tensors(case.shape).values())
    assert push.seconds == pytest.approx(max(links) + push.messages * CLUSTER["message_seconds"])


def test_the_schedule_has_a_line_for_every_box(folder: Path):
    (folder / "mine.yaml").write_text(json.dumps(CLUSTER))
    done = megarl(folder, "plan", "run.yaml", "--cluster", "mine.yaml", "--schedule", "5")
    assert done.returncode == 0, done.stderr
    plan = planned(folder)[1][5]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert Counter(line[2] for line in lines) == {
        "copy": len(plan.local()),
        "from": len(plan.receives()),
        "to": len(plan.sends()),
    }
    assert sum(int(line[-1]) for line in lines if line[2] == "from") == sum(t.nbytes for t in plan.receives())
    assert [int(line[1]) for line in lines] == sorted(int(line[1]) for line in lines)


def test_a_rank_that_the_run_does_not_have_is_refused(folder: Path):
    done = megarl(folder, "plan", "run.yaml", "--schedule", "8")
    assert done.returncode == 2
    assert done.stderr == "megarl: --schedule 8: must be a rank of the 8 GPUs. Fix: give 0 to 7.\n"
