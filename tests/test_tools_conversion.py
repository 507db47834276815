"""The conversion tools as a user calls them: what they print, their exit codes, both models' answers to prompts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizer_case import train

ROOT = Path(__file__).resolve().parents[1]


def tool(name: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tools" / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf: a tiny mixture of experts with a tokenizer; megatron: the same, converted."""
    folder = tmp_path_factory.mktemp("tools")
    tokenizer = train(folder / "tokenizer")
    sizes = "--family qwen3_moe --hidden 32 --layers 2 --heads 2 --kv-heads 1 --ffn 32 --experts 4 --vocab-size 320"
    done = tool("make_tiny_model", "--out", folder / "hf", *sizes.split(), "--tokenizer", tokenizer)
    assert done.returncode == 0, done.stderr
    done = tool("convert_hf_to_megatron", "--hf", folder / "hf", "--out", folder / "megatron", "--expert", 2)
    assert done.returncode == 0, done.stderr
    assert "GB written in" in done.stdout and "GB/s, 1 processes" in done.stdout
    return folder


def test_there_and_back_with_everything_that_belongs_to_it(folder: Path):
    done = tool("convert_megatron_to_hf", "--megatron", folder / "megatron", "--out", folder / "back")
    assert done.returncode == 0, done.stderr
    names = {file.name for file in (folder / "hf").iterdir()}
    assert {file.name for file in (folder / "back").iterdir()} == names
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer.model"} <= names
    for name in names - {"model.safetensors"}:
        assert (folder / "back" / name).read_bytes() == (folder / "hf" / name).read_bytes()


def test_files_of_the_size_asked_for(folder: Path, tmp_path: Path):
    forth = ("--megatron", folder / "megatron", "--out", tmp_path / "back", "--max-file-size", "0.0001")
    assert tool("convert_megatron_to_hf", *forth).returncode == 0
    files = sorted((tmp_path / "back").glob("model-*.safetensors"))
    assert len(files) > 1 and all(file.stat().st_size < 103_000 for file in files)
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in loaded.parameters())


def test_verification_of_a_good_conversion(folder: Path, tmp_path: Path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"question": f"the chain of {n} is 1 + 2"}) for n in range(5)))
    good = ("--hf", folder / "hf", "--megatron", folder / "megatron")
    done = tool("verify_conversion", *good, "--prompts", prompts, "--column", "question")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        "model.layers.*.mlp.experts.*.gate_proj.weight" in done.stdout
        and "45 tensors compared, 0 differ" in done.stdout
    )
    assert float(done.stdout.split("largest difference ")[1].split(",")[0]) < 1e-5
    done = tool("verify_conversion", *good, "--prompts", prompts)
    assert done.returncode == 2 and "must be .jsonl with texts as 'prompt'" in done.stderr
    done = tool("verify_conversion", *good, "--prompts", tmp_path / "nowhere.jsonl")
    assert done.returncode == 2 and "nowhere.jsonl: No such file" in done.stderr


def test_verification_of_another_checkpoint(folder: Path, tmp_path: Path):
    """The same model with other weights, or in another type: every tensor differs."""
    sizes = "--family qwen3_moe --hidden 32 --layers 2 --heads 2 --kv-heads 1 --ffn 32 --experts 4 --vocab-size 320"
    other = tmp_path / "other"
    assert (
        tool("make_tiny_model", "--out", other, *sizes.split(), "--seed", 5, "--tokenizer", folder / "hf").returncode
        == 0
    )
    done = tool("verify_conversion", "--hf", other, "--megatron", folder / "megatron")
    assert done.returncode == 1 and "45 tensors compared, 45 differ" in done.stdout
    assert "differs: model.layers.1.mlp.experts.3.down_proj.weight" in done.stdout
    done = tool(
        "verify_conversion",
        "--hf",
        folder / "hf",
        "--megatron",
        folder / "megatron",
        "--dtype",
        "bf16",
        "--tensors-only",
    )
    assert done.returncode == 1 and "45 differ" in done.stdout


def test_answers_alone_can_give_a_mistake_away(folder: Path, tmp_path: Path):
    """The same weights beside another rotary base: no tensor differs, the answers do."""
    other = shutil.copytree(folder / "hf", tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rope_theta": 100.0}))
    megatron = shutil.copytree(folder / "megatron", tmp_path / "megatron")
    code = (
        "import sys; sys.path.insert(0, 'tools'); import verify_conversion as tool\n"
        "from transformers import AutoModelForCausalLM as M\n"
        f"load = M.from_pretrained; M.from_pretrained = lambda path, **k: load({str(other)!r}, **k)\n"
        f"sys.exit(tool.main(['--hf', {str(folder / 'hf')!r}, '--megatron', {str(megatron)!r}]))"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "45 tensors compared, 0 differ" in done.stdout, done.stderr
    assert float(done.stdout.split("largest difference ")[1].split(",")[0]) > 1e-4


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("convert_hf_to_megatron", "--hf nowhere --out x", "nowhere is no directory"),
        ("convert_hf_to_megatron", "--hf {hf} --out {hf}", "hf: exists, and is not written over"),
        ("convert_hf_to_megatron", "--hf {hf} --out x --tensor 0", "'0' must be a whole number from 1 on"),
        ("convert_hf_to_megatron", "--hf {hf} --out x --dtype fp8", "invalid choice: 'fp8'"),
        ("convert_hf_to_megatron", "--hf {hf} --out x --expert 3", "expert=3: must divide the model's 4 experts"),
        ("convert_hf_to_megatron", "--hf {hf} --out {hf}/config.json/out", "out: cannot be made (Not a directory)"),
        ("convert_megatron_to_hf", "--megatron {hf} --out x", "does not say where its model's config.json"),
        (
            "convert_megatron_to_hf",
            "--megatron {hf} --hf-config {hf} --out x",
            "must be a Megatron distributed checkpoint",
        ),
        ("convert_megatron_to_hf", "--megatron {megatron} --out x --max-file-size big", "'big' must be a size in GB"),
    ],
)
def test_bad_arguments(name: str, arguments: str, message: str, folder: Path, tmp_path: Path):
    places = {"hf": folder / "hf", "megatron": folder / "megatron"}
    given = [word.format(**places) if word != "x" else str(tmp_path / "x") for word in arguments.split()]
    done = tool(name, *given)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
