"""What an engine in FP8 blocks lets be cut: every refusal with its message, and the rule beside the layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from config_case import MODEL
from hypothesis import given, settings
from reshard_worlds import fp8_cases

from megarl.config.block_rules import refusals
from megarl.config.load import load_config
from megarl.config.model_shape import model_shape_from_hf
from megarl.config.quantisation import BLOCK
from megarl.config.rules import broken_rules

#: Qwen2.5-72B and Qwen3-30B-A3B, as far as sizes go.
LARGE = MODEL | {
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "num_hidden_layers": 8,
    "vocab_size": 152_064,
}
MIXTURE = MODEL | {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "head_dim": 128,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "num_hidden_layers": 8,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "vocab_size": 151_936,
}
NEEDS = "and rollout.precision=fp8 needs multiples of 128. Fix: set"
FP8 = "rollout.precision=fp8 parallel.processes=8"

CASES: list[tuple[dict[str, Any], str, list[str]]] = [
    (LARGE, "parallel.tensor=1 parallel.pipeline=8 rollout.tensor=1", []),
    (
        LARGE,
        "parallel.tensor=8 rollout.tensor=8",
        [
            f"{setting}=8: cuts the 29568 rows of gate_proj into parts of 3696, {NEEDS} {setting}=1, "
            "or rollout.precision=bf16."
            for setting in ("parallel.tensor", "rollout.tensor")
        ],
    ),
    (LARGE, "parallel.tensor=8 rollout.tensor=8 rollout.precision=bf16", []),
    (LARGE | {"intermediate_size": 27648}, "parallel.tensor=8 rollout.tensor=8", []),
    (
        LARGE | {"intermediate_size": 27648, "num_attention_heads": 16, "hidden_size": 1024},
        "parallel.tensor=4 rollout.tensor=8",
        [
            f"rollout.tensor=8: cuts the 512 rows of k_proj into parts of 64, {NEEDS} rollout.tensor=4, "
            "or rollout.precision=bf16."
        ],
    ),
    (MIXTURE, "parallel.tensor=2 parallel.sequence=true rollout.tensor=2", []),
    (
        MIXTURE,
        "parallel.tensor=4 parallel.sequence=true rollout.tensor=4",
        [
            "parallel.tensor=4: cuts the 768 rows of experts.gate_proj into parts of 192, "
            f"{NEEDS} parallel.expert_tensor=2, or rollout.precision=bf16.",
            "rollout.tensor=4: cuts the 768 rows of experts.gate_proj into parts of 192, "
            f"{NEEDS} rollout.expert_parallel=true, or rollout.precision=bf16.",
        ],
    ),
    (
        MIXTURE,
        "parallel.tensor=4 parallel.sequence=true parallel.expert_tensor=1 parallel.expert=4 "
        "rollout.tensor=4 rollout.expert_parallel=true",
        [],
    ),
    (
        MIXTURE,
        "parallel.tensor=2 parallel.sequence=true parallel.expert_tensor=8 rollout.tensor=2",
        [
            "parallel.expert_tensor=8: cuts the 768 rows of experts.gate_proj into parts of 96, "
            f"{NEEDS} parallel.expert_tensor=2, or rollout.precision=bf16."
        ],
    ),
    # Nothing is cut, but vLLM fuses.
    (
        MODEL | {"intermediate_size": 96},
        "",
        [
            "rollout.precision=fp8: needs q_proj with a multiple of 128 rows, since vLLM keeps what follows in the "
            "same tensor, and the model has 60. Fix: set rollout.precision=bf16."
        ],
    ),
]


@pytest.mark.parametrize(("model", "overrides", "messages"), CASES)
def test_every_refusal(run_file: Path, model: dict[str, Any], overrides: str, messages: list[str]):
    given_first = FP8.split()
    config = load_config(run_file, [*given_first, *overrides.split()])
    found = [str(one) for one in broken_rules(config, model_shape_from_hf(model))]
    assert [one for one in found if "fp8" in one] == messages
    assert not messages or len(found) == len(messages)


def within(box: tuple[tuple[int, int], ...], dims: tuple[int, ...]) -> bool:
    """Whether a box of a tensor of the checkpoint begins or ends within a block."""
    pairs = zip(box, dims, strict=True)
    return any(start % BLOCK or (stop % BLOCK and stop < length) for (start, stop), length in pairs)


@settings(deadline=None, max_examples=150)
@given(fp8_cases(fitting=False))
def test_the_rule_is_that_of_the_layouts(case: Any):
    """Refused is what any rank of policy or engine has of a checkpoint's tensor with an end within a block, or would
    have within a block of vLLM's fused tensor."""
    from megarl.reshard.fp8_map import quantised_weights, weight_parts
    from megarl.reshard.weight_map import hf_tensors

    dims, weights = hf_tensors(case.shape), quantised_weights(case.shape)
    bad = False
    for rank in range(case.world):
        bad |= any(within(part.box, dims[part.name]) for part in weight_parts(case.policy(rank), weights))
        for tensor in case.plain_engine_of(rank).values():
            for region in tensor.regions:
                if region.hf_name in weights:
                    fused = any(start % BLOCK for start, _ in region.local_box[-2:])
                    bad |= fused or within(region.hf_box, dims[region.hf_name])
    assert bool(list(refusals(case.config(), case.shape))) == bad
