"""Every file in configs/ is a run that breaks no rule, with its model's published sizes and the files it names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from megarl.config import files, rules
from megarl.config.data import DATA_SUFFIXES
from megarl.config.implied import Implied
from megarl.config.load import load_config
from megarl.config.model_shape import read_model_shape
from megarl.config.schema import RunConfig

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
#: Every run; tables and suites are none.
RUNS = [*CONFIGS.glob("*.yaml"), *(CONFIGS / "reproduce").glob("*.yaml")]
#: The GPUs of those that name them, by their paths without an ending.
GPUS = {file.relative_to(CONFIGS).with_suffix("").as_posix(): gpus for file in RUNS if (gpus := load_config(file).gpus)}

#: Models that the recipes name: type, hidden, layers, heads, key-value heads, MLP, vocabulary, positions.
PUBLISHED: dict[str, tuple[str, int, int, int, int, int, int, int]] = {
    "Qwen2.5-Math-7B": ("qwen2", 3584, 28, 28, 4, 18944, 152064, 4096),
    "Qwen2.5-32B": ("qwen2", 5120, 64, 40, 8, 27648, 152064, 131072),
    "Qwen2.5-72B": ("qwen2", 8192, 80, 64, 8, 29568, 152064, 131072),
    "Qwen2.5-72B-Instruct": ("qwen2", 8192, 80, 64, 8, 29568, 152064, 32768),
    "Qwen2.5-7B-Instruct": ("qwen2", 3584, 28, 28, 4, 18944, 152064, 32768),
    "Qwen2.5-3B-Instruct": ("qwen2", 2048, 36, 16, 2, 11008, 151936, 32768),
    "Qwen2.5-3B": ("qwen2", 2048, 36, 16, 2, 11008, 151936, 32768),
    "DeepSeek-R1-Distill-Qwen-1.5B": ("qwen2", 1536, 28, 12, 2, 8960, 151936, 131072),
    "DeepSeek-R1-Distill-Qwen-7B": ("qwen2", 3584, 28, 28, 4, 18944, 152064, 131072),
    "DeepSeek-R1-Distill-Qwen-32B": ("qwen2", 5120, 64, 40, 8, 27648, 152064, 131072),
    "DeepSeek-R1-Distill-Llama-70B": ("llama", 8192, 80, 64, 8, 28672, 128256, 131072),
    "Llama-3.2-3B": ("llama", 3072, 28, 24, 8, 8192, 128256, 131072),
    "Qwen3-8B-Base": ("qwen3", 4096, 36, 32, 8, 12288, 151936, 32768),
    "Qwen3-8B": ("qwen3", 4096, 36, 32, 8, 12288, 151936, 40960),
    "Qwen3-32B": ("qwen3", 5120, 64, 64, 8, 25600, 151936, 40960),
    "Qwen3-30B-A3B": ("qwen3_moe", 2048, 48, 32, 4, 6144, 151936, 40960),
    "Qwen3-235B-A22B": ("qwen3_moe", 4096, 94, 64, 4, 12288, 151936, 40960),
}
#: The tiny models of the runs that fit a laptop, as launch/quickstart.sh and the files' comments make them.
TINY = ("qwen2", 128, 4, 4, 2, 384, 320, 2048)
#: Experts, experts per token, an expert's MLP, of the mixtures of experts.
EXPERTS = {"Qwen3-30B-A3B": (128, 8, 768), "Qwen3-235B-A22B": (128, 8, 1536), "model": (8, 2, 128)}
LAPTOP_MODELS = {
    "configs/models/qwen2_307m": ("qwen2", 1024, 20, 16, 4, 3072, 32000, 2048),
    "data/bench/model": ("qwen2", 256, 4, 8, 2, 768, 512, 2048),
    "data/gpu/step_model": ("qwen2", 3584, 8, 28, 4, 18944, 152064, 8192),
    "data/gpu/push_model": ("qwen2", 3584, 8, 28, 4, 18944, 152064, 8192),
    "data/quickstart_fp8/model": ("qwen2", 256, 4, 4, 4, 512, 320, 2048),
    "data/quickstart_moe/model": ("qwen3_moe", 128, 4, 4, 2, 128, 320, 2048),
}


def write_model(path: Path, sizes: tuple[str, int, int, int, int, int, int, int]) -> None:
    kind, hidden, layers, heads, kv_heads, ffn, vocabulary, positions = sizes
    config: dict[str, Any] = {
        "model_type": kind,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": ffn,
        "vocab_size": vocabulary,
        "max_position_embeddings": positions,
    }
    if kind.startswith("qwen3") and hidden > 1000:
        config["head_dim"] = 128
    if kind == "qwen3_moe":
        experts, chosen, width = EXPERTS[path.name]
        config |= {"num_experts": experts, "num_experts_per_tok": chosen, "moe_intermediate_size": width}
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    save_file({"model.norm.weight": np.ones(1, np.float32)}, path / "model.safetensors")


def write_files(config: RunConfig) -> None:
    """What the configuration names, in the working directory."""
    path = Path(config.model.path)
    write_model(path, PUBLISHED.get(path.name) or LAPTOP_MODELS.get(str(path), TINY))
    for folder in Implied(config).checkpoints.values():
        Path(folder).mkdir(parents=True, exist_ok=True)
    demonstrations = None if config.data.demonstrations is None else config.data.demonstrations.path
    for name in (config.data.path, demonstrations, config.evaluation.path, config.model.tokenizer):
        if name is not None and name.endswith((*DATA_SUFFIXES, ".model")):
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_text("{}")


@pytest.mark.parametrize("path", sorted(RUNS), ids=lambda path: path.stem)
def test_shipped_configuration_breaks_no_rule(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(path)
    assert config.name == path.stem
    # Paths are relative to the working directory; some lead to its neighbours.
    (tmp_path / "checkout").mkdir()
    monkeypatch.chdir(tmp_path / "checkout")
    write_files(config)
    assert [str(refusal) for refusal in rules.broken_rules(config, processes=config.gpus)] == []


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_known_model_has_its_published_sizes(name: str, tmp_path: Path) -> None:
    write_model(tmp_path / name, PUBLISHED[name])
    assert parameters_of(files.KNOWN_MODELS / name) == parameters_of(tmp_path / name)


def parameters_of(folder: Path) -> tuple[Any, ...]:
    shape = read_model_shape(folder)
    experts = (shape.num_experts, shape.experts_per_token, shape.expert_ffn_size)
    sizes = (shape.hidden_size, shape.num_layers, shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.ffn_size)
    return (shape.family, *sizes, shape.vocab_size, shape.max_positions, shape.sparse_layers, *experts)


def test_every_model_that_is_known_is_published_and_large() -> None:
    known = {folder.name for folder in files.KNOWN_MODELS.iterdir()}
    assert known == {*PUBLISHED, "qwen2_307m"}


def test_the_rules_are_really_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(CONFIGS / "reproduce" / "nft_7b_nft.yaml", ["parallel.tensor=3", "rollout.max_tokens=4000"])
    monkeypatch.chdir(tmp_path)
    write_files(config)
    broken = [refusal.value for refusal in rules.broken_rules(config, processes=66)]
    assert "parallel.tensor=3" in broken
    assert "data.max_prompt_tokens=512 + rollout.max_tokens=4000" in broken
