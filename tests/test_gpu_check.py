"""launch/gpu_check.sh where there is no GPU, and what it rests on: parts with limits, inputs, the table."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

gpu_table = importlib.import_module("gpu_table")
make_gpu_inputs = importlib.import_module("make_gpu_inputs")


def bash(script: str, results: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs `script` with the functions of launch/gpu_parts.sh."""
    return subprocess.run(
        ["bash", "-c", f"set -uo pipefail; source launch/gpu_parts.sh; {script}"],
        cwd=ROOT,
        env=os.environ | {"MEGARL_GPU_RESULTS": str(results)} | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def outcomes(results: Path) -> dict[str, str]:
    rows = [line.split("\t") for line in (results / "parts.tsv").read_text().splitlines()]
    assert all(0 <= float(seconds) < 60 for _, _, seconds in rows)
    return {name: outcome for name, outcome, _ in rows}


def test_a_part_that_fails_or_hangs_stops_no_other(tmp_path: Path) -> None:
    script = """
    fails() { echo said; echo "of it" >&2; return 3; }
    part one 10 true
    part two 10 fails
    part three 1 sleep 30
    part deaf 2 bash -c 'trap "" TERM; sleep 30; sleep 30'
    part four 10 bash -c 'echo "{}"'
    """
    done = bash(script, tmp_path)
    assert done.returncode == 0
    assert outcomes(tmp_path) == {
        "one": "ok",
        "two": "failed (3)",
        "three": "not done in 1 s",
        "deaf": "not done in 2 s",
        "four": "ok",
    }
    seconds = dict(line.split("\t")[::2] for line in (tmp_path / "parts.tsv").read_text().splitlines())
    # Killed before its limit, so that the limits of all parts add up to what they may take.
    assert 1.9 < float(seconds["deaf"]) < 2.5
    assert (tmp_path / "four.out").read_text() == "{}\n"
    assert "said" in done.stderr and "of it" in done.stderr


def test_parts_may_be_chosen(tmp_path: Path) -> None:
    bash("part one 5 true; part two 5 true; gpu_part three 5 true", tmp_path, MEGARL_GPU_PARTS="two")
    assert outcomes(tmp_path) == {"two": "ok"}


def test_a_bundle_with_a_damaged_part_is_not_installed(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    (bundle / "bundle.tar.000").write_text("wheels")
    (bundle / "bundle.python").write_text("cp399-x86_64\n")
    (bundle / "bundle.sha256").write_text(f"{'0' * 64}  bundle.tar.000\n")
    done = bash(f"part install 20 install_bundle {bundle}", tmp_path)
    assert outcomes(tmp_path) == {"install": "failed (1)"}
    assert "bundle.tar.000: FAILED" in done.stderr
    subprocess.run("sha256sum bundle.tar.* >bundle.sha256", shell=True, cwd=bundle, check=True)
    done = bash(f"part install 20 install_bundle {bundle}", tmp_path)
    assert "is for cp399-x86_64: set PYTHON to such a Python" in done.stderr


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="for a machine without a GPU")
def test_without_a_gpu_each_part_says_so_and_the_table_still_comes(tmp_path: Path) -> None:
    """In a copy of what the check runs, so that no results of another are replaced."""
    for name in ("launch", "tools"):
        (tmp_path / name).symlink_to(ROOT / name)
    script = (ROOT / "launch" / "gpu_check.sh").read_text()
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "gpu_check.sh").write_text(script)
    done = subprocess.run(
        ["bash", str(tmp_path / "here" / "gpu_check.sh")], capture_output=True, text=True, timeout=60, check=True
    )
    parts = ["inputs", "rates", "tests", "step_bf16", "step_fp8", "push", "memory"]
    assert outcomes(tmp_path / "runs" / "gpu_check") == dict.fromkeys(parts, "no GPU")
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["|", "part", "|", "outcome", "|", "seconds", "|"]
    assert [line.split("|")[1].strip() for line in lines[2:]] == parts
    assert (tmp_path / "runs" / "gpu_check" / "table.md").read_text() == done.stdout


def test_limits_add_up_to_less_than_ten_minutes() -> None:
    lines = (ROOT / "launch" / "gpu_check.sh").read_text().splitlines()
    limits = [int(line.split("part ")[1].split()[1]) for line in lines if "part " in line and not line.startswith("#")]
    assert len(limits) == 8 and sum(limits) <= 590


def test_inputs_are_layers_of_the_7b_model_and_sequences_of_8192_tokens(tmp_path: Path) -> None:
    from megarl.config.model_shape import read_model_shape
    from megarl.data.tokenizer import load_tokenizer
    from megarl.reshard.weight_map import hf_tensors

    assert make_gpu_inputs.main(["--out", str(tmp_path), "--memory-gib", "80", "--rows", "20"]) == 0
    model = json.loads((tmp_path / "step_model" / "config.json").read_text())
    assert model["num_hidden_layers"] == 8
    shape = read_model_shape(tmp_path / "step_model")
    total = sum(dims[0] * (dims[1] if len(dims) > 1 else 1) for dims in hf_tensors(shape).values())
    assert total == 8 * make_gpu_inputs.PER_LAYER + make_gpu_inputs.ENDS == gpu_table.parameters(model)[1]
    tokenizer = load_tokenizer(tmp_path / "tokenizer" / "tokenizer.model")
    rows = [json.loads(line) for line in (tmp_path / "long.jsonl").read_text().splitlines()]
    assert {len(tokenizer.encode(row["solution"])) for row in rows} == {8192 - make_gpu_inputs.AROUND}
    assert make_gpu_inputs.main(["--out", str(tmp_path)]) == 2


def test_the_table_works_out_shares_of_the_gpus_own_rates(tmp_path: Path) -> None:
    inputs = tmp_path / "inputs"
    for name in ("step_model", "push_model"):
        (inputs / name).mkdir(parents=True)
        (inputs / name / "config.json").write_text(json.dumps(make_gpu_inputs.QWEN_7B | {"num_hidden_layers": 2}))
    rates = {"BF16 product": 800.0, "copy on the device": 2000.0}
    lines = [json.dumps({"name": name, "value": rate, "unit": "", "bar": ""}) for name, rate in rates.items()]
    (tmp_path / "figures.jsonl").write_text("\n".join(lines))
    step = {"seconds": {"update": 1.0}, "tokens_trained": 65536, "peak_memory_bytes": 2**34}
    (tmp_path / "step_bf16.out").write_text("noise\n" + json.dumps(step))
    (tmp_path / "step_fp8.out").write_text(json.dumps(step | {"seconds": {"update": 0.8}}))
    push = {"seconds": 0.01, "unchecked_seconds": 0.005, "check_seconds": 0.002, "bitwise_equal": True}
    (tmp_path / "push.out").write_text(json.dumps(push))
    (tmp_path / "parts.tsv").write_text("inputs\tok\t1.0\n")
    # Products of 2 layers and the head, by hand: q, k, v, o, gate, up, down; 152,064 x 3,584.
    products = 2 * (3584 * (3584 + 1024) + 3584 * 3584 + 3 * 3584 * 18944) + 152064 * 3584
    flops = 65536 * (6 * products + 6 * 2 * 3584 * 8192)
    figures = {
        one.name: one
        for one in (*gpu_table.of_steps(tmp_path, inputs, rates), *gpu_table.of_push(tmp_path, inputs, rates))
    }
    assert figures["update in BF16, 2 layers"].value == pytest.approx(flops / 1e12)
    assert figures["update in BF16 / BF16 product"] == gpu_table.Figure(
        "update in BF16 / BF16 product", pytest.approx(flops / 1e12 / 800), "", ">= 0.50"
    )
    assert figures["update in FP8 / in BF16, speed"].value == pytest.approx(1.25)
    moved = 2 * (2 * make_gpu_inputs.PER_LAYER + make_gpu_inputs.ENDS)
    assert figures["push / copy on the device"].value == pytest.approx(moved / 0.005 / 2e12)
    assert gpu_table.main([str(tmp_path), "--inputs", str(inputs)]) == 0
    assert gpu_table.main([str(tmp_path / "none")]) == 2
