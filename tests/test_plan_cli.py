"""`megarl plan` as a user meets it: exit codes, one sentence for what is refused, tables and JSON."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from config_case import MODEL, write_case
from test_cli import CLEAN, ROOT, megarl

from megarl.config.cluster import GIB, Cluster, read_cluster
from megarl.config.load import load_config
from megarl.config.model_shape import read_model_shape
from megarl.errors import Refusal
from megarl.rehearsal.shards import shards_of

CLUSTER = {
    "gpus_per_node": 4,
    "gpu_memory_gib": 16,
    "compute_capability": "9.0",
    "host_memory_gib": 64,
    "nvlink_bytes_per_second": 1e11,
    "network_bytes_per_second": 1e10,
    "hbm_bytes_per_second": 1e12,
    "bf16_flops_per_second": 1e14,
    "message_seconds": 1e-5,
    "reserved_gib": 1,
}


@pytest.fixture
def case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a run for 4 GPUs whose weights are not there, and a cluster; the working directory is it."""
    monkeypatch.chdir(tmp_path)
    write_case(tmp_path, parallel={"tensor": 2, "pipeline": 2}, rollout={"max_tokens": 64, "kv_cache_gib": 0.1})
    (tmp_path / "model" / "model.safetensors").unlink()
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(CLUSTER))
    return tmp_path


def refused(*arguments: str, folder: Path) -> str:
    result = megarl(folder, "plan", "run.yaml", *arguments)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_the_largest_recipe_is_planned_in_a_minute_and_little_memory() -> None:
    """And a launcher's variables are passed over."""
    started = time.perf_counter()
    result = megarl(ROOT, "plan", "configs/grpo_qwen3_235b_a22b.yaml", RANK="0", WORLD_SIZE="2")
    seconds = time.perf_counter() - started
    assert result.returncode == 0, result.stderr
    assert "grpo_qwen3_235b_a22b on 256 GPUs: tensor 4, pipeline 8" in result.stdout
    assert "235,093,634,560 by config.json, 235,093,634,560 in the shards" in result.stdout
    assert "a start here would be refused: model.path=models/Qwen3-235B-A22B: must hold weights" in result.stdout
    assert "fits: the tightest is push on pipeline stage 1" in result.stdout
    assert result.stderr == "megarl: building the shards of 8 pipeline stage(s), without memory\n"
    assert seconds < 60
    # Of the largest child of this process so far, in KiB.
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 8 * 2**20


def test_json_is_one_line_with_every_figure_and_this_process_stays_free_of_torch(case: Path) -> None:
    code = (
        "import sys; from megarl.cli import main\n"
        "sys.argv = ['megarl', 'plan', 'run.yaml', 'parallel.processes=8', '--cluster', 'mine.yaml', '--json']\n"
        "try: main.main()\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "assert not {'torch', 'megatron', 'vllm'} & set(sys.modules)"
    )
    environment = CLEAN | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], cwd=case, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert not (case / "runs").exists()
    (line,) = result.stdout.splitlines()
    report = json.loads(line)
    assert report["processes"] == 8
    assert report["layout"]["data"] == 2
    # Embedding and head, 6 layers of attention with biases, gated MLPs, norms.
    hidden, ffn, vocabulary = MODEL["hidden_size"], MODEL["intermediate_size"], MODEL["vocab_size"]
    query, key = 60, 20
    layer = hidden * (query + 2 * key) + query + 2 * key + query * hidden + 3 * hidden * ffn + 2 * hidden
    assert report["parameters"]["exact"] == report["parameters"]["counted"]
    assert report["parameters"]["exact"] == 2 * vocabulary * hidden + 6 * layer + hidden
    assert {one["phase"] for one in report["phases"]} == {"train", "push", "rollout"}
    for one in report["phases"]:
        assert one["used"] == sum(amount["bytes"] for amount in one["amounts"])
        assert one["margin"] == one["limit"] - one["used"] == 16 * GIB - one["used"]
    assert report["push"]["received_bytes_max_rank"] == report["push"]["lower_bound_max_rank"] > 0
    assert report["fits"] is True


def test_a_run_that_does_not_fit_ends_with_1(case: Path) -> None:
    result = megarl(case, "plan", "run.yaml", "--gpus", "4", "--cluster", "mine.yaml", "--gpu-memory-gib", "1.001")
    assert result.returncode == 1
    verdict = result.stdout.splitlines()[-1]
    assert verdict.startswith("does not fit: push on pipeline stage 0 needs 1.5 GiB, and a GPU has 1.0 GiB. Fix: set ")
    assert verdict.endswith(" GiB are still lacking.")


def test_what_is_refused(case: Path) -> None:
    assert refused(folder=case) == ("megarl: gpus: must be known to plan a run. Fix: give --gpus N, or set gpus.\n")
    assert "must be a multiple of parallel.tensor x parallel.pipeline" in refused("--gpus", "6", folder=case)
    assert "gives an update 96 sequence(s), fewer than the 100" in refused("--gpus", "400", folder=case)
    assert "--gpus 0: must be at least 1" in refused("--gpus", "0", folder=case)
    assert "Fix: use h100 or h200, or the path" in refused("--gpus", "4", "--cluster", "a100", folder=case)
    sequence = refused("--gpus", "4", "precision=fp32", folder=case)
    assert "has no attention kernel in Transformer Engine" in sequence
    (case / "ada.yaml").write_text(yaml.safe_dump(CLUSTER | {"compute_capability": 8.9}))
    assert "on a GPU of compute capability 8.9: Transformer Engine's attention has a backward pass" in refused(
        "--gpus", "4", "deterministic=true", "--cluster", "ada.yaml", folder=case
    )
    unknown = refused("--gpus", "4", "parallel.tensr=2", folder=case)
    assert unknown == "megarl: parallel.tensr: is not a known key. Fix: use parallel.tensor.\n"


def test_what_megatrons_configuration_refuses_is_one_sentence(case: Path) -> None:
    config = load_config("run.yaml", ["megatron.cpu_offloading=true"])
    with pytest.raises(Refusal, match="is refused by Megatron"):
        shards_of(config, read_model_shape("model"), 4)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"gpus_per_node": 0}, "gpus_per_node=0: must be greater than 0"),
        (
            {"hbm_bytes_per_second": "fast"},
            "hbm_bytes_per_second=fast: must be a plain decimal number. Fix: give hbm_bytes_per_second such a value",
        ),
        ({"speed": 1}, "speed: is not a known key"),
        ({"compute_capability": 9}, "compute_capability=9: must be NVIDIA's major and minor number, such as 9.0"),
        ({"compute_capability": None}, "compute_capability=null: must be text"),
        ({"gpu_memory_gib": None}, "gpu_memory_gib=null: must be a valid number"),
    ],
)
def test_a_cluster_is_checked(changes: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(yaml.safe_dump(CLUSTER | changes))
    with pytest.raises(Refusal) as refusal:
        read_cluster(str(file))
    assert str(refusal.value).startswith(sentence)


def test_clusters_that_have_names() -> None:
    h100, h200 = read_cluster("h100"), read_cluster("h200", gpu_memory_gib=100)
    assert (h100.gpus_per_node, h200.gpus_per_node) == (8, 8)
    assert h100.capability == h200.capability == (9, 0)
    assert Cluster.model_validate(CLUSTER | {"compute_capability": "12.1"}).capability == (12, 1)
    assert h100.nvlink_bytes_per_second == 450e9
    assert h100.network_bytes_per_second == 400e9 / 8
    assert h200.gpu_memory == 100 * GIB
    assert read_cluster("h200") == h200.model_copy(update={"gpu_memory_gib": 139.8})
    assert Cluster.model_validate(CLUSTER).reserved == GIB
