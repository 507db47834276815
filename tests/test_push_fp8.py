"""Engines in FP8 blocks: the push against vLLM's own loader of an FP8 checkpoint, and the numbers they compute with
against a plain forward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import parity
import pytest
import test_push

#: Of whole blocks where tensor parallelism of 2 cuts, and where vLLM fuses.
SIZES = {
    "head_dim": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 256,
    "vocab_size": 130,
}
#: vLLM's Qwen2 takes the heads' size from hidden_size; that of others need not be of whole blocks.
HIDDEN = {"qwen2-tied": 256, "qwen2-moe": 256, "qwen3-untied": 224, "qwen3-moe": 224, "mixtral": 224}
EXPERTS = {
    "qwen2-moe": {"moe_intermediate_size": 256, "shared_expert_intermediate_size": 256},
    "qwen3-moe": {"moe_intermediate_size": 128},
}
#: Processes, engine, cases (model, number of a layout), layouts.
WORLDS: tuple[tuple[int, dict[str, Any], list[tuple[str, int]], list[dict[str, Any]]], ...] = (
    (
        4,
        {"tensor": 2, "precision": "fp8"},
        [("qwen3-untied", 0), ("qwen2-tied", 1)],
        [{"tensor": 2, "pipeline": 2}, {"pipeline": 2}],
    ),
    (
        2,
        {"tensor": 2, "precision": "fp8", "expert_parallel": True},
        [("qwen3-moe", 0), ("mixtral", 1)],
        [{"expert": 2}, {"tensor": 2, "sequence": True, "expert": 2, "expert_tensor": 1}],
    ),
    (2, {"tensor": 2, "precision": "fp8"}, [("qwen2-moe", 0)], [{"tensor": 2, "sequence": True}]),
)
UPDATES = 2


def write_model(folder: Path, model: str) -> Path:
    sizes = SIZES | EXPERTS.get(model, {}) | {"hidden_size": HIDDEN[model], "vocab_size": 130}
    return parity.write_model(folder, model, **sizes)


@pytest.mark.parametrize("number", range(len(WORLDS)))
def test_engine_holds_what_vllm_loads_from_an_fp8_checkpoint(tmp_path: Path, number: int):
    """Values and scales bitwise, of dense models and mixtures, adapters merged; and so are its answers."""
    processes, engine, cases, layouts = WORLDS[number]
    for model, _ in cases:
        write_model(tmp_path, model)
    ranks = parity.run_world("test_push", "pushes", processes, tmp_path, engine, cases, layouts, UPDATES)
    # Of how far rounding to FP8 carries the log-probs of such models, see below.
    test_push.check(ranks, set(cases), UPDATES, gap=8.0)
    for rank in ranks:
        for rounds, _, _ in rank.values():
            held = rounds[-1].engine
            scales = {name for name in held if name.endswith("_scale_inv")}
            assert len(scales) >= 8
            for name in scales:
                # What the CPU multiplies with is what the values stand for.
                values, dense = held[name.removesuffix("_scale_inv")], held.get(f"{name[:-10]} (packed)")
                assert np.frexp(held[name])[0].tolist() == np.full(held[name].shape, 0.5).tolist()
                if dense is not None:
                    tiles = held[name].repeat(128, 0).repeat(128, 1)[: values.shape[0], : values.shape[1]]
                    assert np.array_equal(dense, values * tiles), name
