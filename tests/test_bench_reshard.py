"""`megarl bench reshard` on tiny models: the least traffic is counted, and both pushes fill the engine alike."""

from __future__ import annotations

import json
from pathlib import Path

import parity
import preloaded
import pytest
import torch

ROOT = Path(__file__).parent.parent
SIZES = {"hidden_size": 128, "head_dim": 32}
#: Of whole blocks in each half.
BLOCKS = {"hidden_size": 256, "head_dim": 64, "num_key_value_heads": 4, "intermediate_size": 256}


def bench(tmp_path: Path, model: str, layout: str) -> tuple[int | None, str, str]:
    """Exit code, output and errors."""
    path = parity.write_model(tmp_path, model, **(BLOCKS if "fp8" in layout else SIZES))
    settings = f"model.path={path} steps=1 parallel.processes=4 weights.bucket_mib=0.05 {layout}"
    config = ROOT / "configs" / "bench_reshard.yaml"
    started = preloaded.megarl(tmp_path, "bench", "reshard", str(config), "--json", *settings.split(), apart=True)
    output, errors = started.communicate()
    return started.returncode, output, errors


@pytest.mark.parametrize("precision", ["fp32", "fp8"])
def test_least_traffic_and_the_same_bits(tmp_path: Path, precision: str):
    """Where the engine is in FP8, quantised at the source and after gathering."""
    layout = f"parallel.tensor=2 parallel.pipeline=2 rollout.tensor=2 rollout.precision={precision}"
    code, output, errors = bench(tmp_path, "qwen2-untied", layout)
    assert code == 0, errors[-3000:]
    found = json.loads(output)
    assert found["bitwise_equal"] is True
    assert found["bytes_received_max_rank"] == found["bytes_lower_bound_max_rank"] > 0
    assert found["gather_bytes_received_max_rank"] > found["bytes_received_max_rank"]
    assert found["seconds"] > 0 and found["gather_seconds"] > 0 and len(found["ratios"]) == 1
    # What the checksum adds, in pushes of its own.
    assert all(found[f"{kind}_seconds"] > 0 for kind in ("unchecked", "checked", "check"))
    assert found["bucket_bytes"] == int(0.05 * 2**20)


@pytest.mark.skipif(torch.cuda.is_available(), reason="of the CPU backend")
def test_a_mixture_that_vllm_cannot_load_twice_is_refused(tmp_path: Path):
    layout = "parallel.tensor=1 parallel.expert=2 parallel.pipeline=2 rollout.tensor=4"
    code, _, errors = bench(tmp_path, "qwen3-moe", layout)
    assert code == 2 and "is packed by this backend in a way that vLLM's reload does not undo" in errors
