"""A small run on disk for the tests of configuration and command line: model, data and the YAML that names them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from megarl.config.schema import RunConfig

MODEL = {
    "model_type": "qwen2",
    "hidden_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 300,
    "max_position_embeddings": 256,
}

#: One that FP8 can multiply: its sides are multiples of 16 under TP 1 to 4.
DENSE = MODEL | {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 64}

#: A mixture of experts of such sides.
SPARSE = DENSE | {
    "model_type": "qwen2_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 64,
}

#: A tokenizer of two tokens: unknown words, and the end.
TOKENIZER: dict[str, Any] = {
    "version": "1.0",
    "added_tokens": [
        {"id": 1, "content": "</s>", "special": True, "normalized": False}
        | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    ],
    "pre_tokenizer": {"type": "WhitespaceSplit"},
    "model": {"type": "WordLevel", "vocab": {"<unk>": 0, "</s>": 1}, "unk_token": "<unk>"},
}

RUN: dict[str, Any] = {
    "name": "case",
    "steps": 3,
    "model": {"path": "model"},
    "algorithm": {"name": "grpo"},
    "data": {"path": "rows.jsonl", "answer_column": "answer", "max_prompt_tokens": 64},
    "rollout": {"max_tokens": 64},
    "batch": {"prompts": 12, "tokens_per_microbatch": 512},
}


def config_with(**sections: Any) -> RunConfig:
    """That run, with other top-level keys."""
    return RunConfig.model_validate(RUN | sections)


def write_case(folder: Path, **changes: Any) -> Path:
    """Write model, data and `run.yaml` into `folder`; `changes` replace top-level keys of the run."""
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(MODEL))
    save_file({"model.norm.weight": np.ones(64, np.float32)}, model / "model.safetensors")
    (model / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (model / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    (folder / "rows.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    run = folder / "run.yaml"
    run.write_text(yaml.safe_dump(RUN | changes, sort_keys=False))
    return run


@pytest.fixture
def run_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The YAML file of a run that breaks no rule; the working directory is its folder."""
    monkeypatch.chdir(tmp_path)
    return write_case(tmp_path)
