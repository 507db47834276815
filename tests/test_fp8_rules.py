"""What FP8 is refused for, with the exact message, and what Megatron is told of it on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from config_case import DENSE, SPARSE, config_with

from megarl.config import fp8_rules
from megarl.config.model_shape import ModelShape, model_shape_from_hf
from megarl.config.rules import broken_setting_rules
from megarl.config.schema import RunConfig
from megarl.policy.batch import Cut


def run_of(precision: str, **sections: Any) -> RunConfig:
    return config_with(precision=precision, logging={"tensorboard": False}, **sections)


def shape_of(fields: dict[str, Any]) -> ModelShape:
    return model_shape_from_hf(fields, "config.json")


def said(config: RunConfig, fields: dict[str, Any] = DENSE) -> list[str]:
    return [str(refusal) for refusal in fp8_rules.refusals(config, shape_of(fields))]


ALL_RECIPES = ("fp8-tensorwise", "fp8-delayed", "fp8-blockwise")
EXPERTS = {"processes": 4, "tensor": 1, "expert": 2, "expert_tensor": 4}

REFUSED: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    (
        "bf16",
        {"fp8": {"param": True}},
        DENSE,
        "fp8.param=true: has no effect with precision=bf16. "
        "Fix: set precision to fp8-tensorwise, fp8-delayed or fp8-blockwise, or remove it.",
    ),
    (
        "fp8-blockwise",
        {"fp8": {"amax_history_len": 16}},
        DENSE,
        "fp8.amax_history_len=16: has no effect with precision=fp8-blockwise. "
        "Fix: set precision=fp8-delayed, or remove it.",
    ),
    (
        "fp8-delayed",
        {"fp8": {"num_layers_at_start_in_bf16": 1}},
        DENSE,
        "fp8.num_layers_at_start_in_bf16=1 with precision=fp8-delayed: is not possible: Megatron has delayed scaling "
        "in all layers or in none. Fix: remove it, or set precision=fp8-tensorwise or fp8-blockwise.",
    ),
    (
        "fp8-tensorwise",
        {"fp8": {"num_layers_at_end_in_bf16": 3}, "parallel": {"processes": 2, "pipeline": 2}},
        DENSE,
        "fp8.num_layers_at_end_in_bf16=3: must not exceed the 2 layers of a pipeline stage. Fix: use at most 2.",
    ),
    (
        "fp8-tensorwise",
        {"fp8": {"num_layers_at_start_in_bf16": 2, "num_layers_at_end_in_bf16": 2}},
        DENSE,
        "fp8.num_layers_at_start_in_bf16=2 + fp8.num_layers_at_end_in_bf16=2: leaves none of the model's 4 layers in "
        "FP8. Fix: use fewer, or set precision=bf16.",
    ),
    (
        "fp8-delayed",
        {"recompute": {"kind": "selective", "modules": ["layernorm"]}},
        DENSE,
        "recompute.modules=layernorm with precision=fp8-delayed: is not possible: Megatron recomputes it with the "
        "histories of the next pass. Fix: remove it, or set precision=fp8-tensorwise or fp8-blockwise.",
    ),
    (
        "fp8-blockwise",
        {"fp8": {"param": True}, "parameters": "adapter"},
        DENSE,
        "fp8.param=true with an adapter: is not possible: an adapter is merged into bf16 weights. "
        "Fix: remove it, or train without an adapter.",
    ),
    (
        "fp8-blockwise",
        {"fp8": {"param": True}, "algorithm": {"name": "grpo", "kl_coefficient": 0.1}},
        DENSE,
        "fp8.param=true with the parameter set reference: is not possible: other weights take the place of the "
        "policy's, which would have to be in FP8 too. Fix: remove it.",
    ),
    (
        "fp8-tensorwise",
        {"parallel": {"processes": 8, "tensor": 8}},
        DENSE | {"num_key_value_heads": 8},
        "precision=fp8-tensorwise with parallel.tensor=8: gives self_attention.linear_qkv 24 outputs on a rank, which "
        "must be a multiple of 16. Fix: set parallel.tensor=4, or precision=bf16.",
    ),
    (
        "fp8-blockwise",
        {"parallel": EXPERTS},
        SPARSE,
        "precision=fp8-blockwise with parallel.expert_tensor=4: gives mlp.experts.linear_fc2 8 inputs on a rank, which "
        "must be a multiple of 16. Fix: set parallel.expert_tensor=2, or precision=bf16.",
    ),
    (
        "fp8-blockwise",
        {},
        DENSE | {"intermediate_size": 72},
        "precision=fp8-blockwise with parallel.tensor=1: gives mlp.linear_fc2 72 inputs on a rank, which must be a "
        "multiple of 16. Fix: set precision=bf16.",
    ),
]


@pytest.mark.parametrize(("precision", "sections", "fields", "message"), REFUSED)
def test_refusals(precision: str, sections: dict[str, Any], fields: dict[str, Any], message: str):
    assert message in said(run_of(precision, **sections), fields)


@pytest.mark.parametrize("precision", ALL_RECIPES)
@pytest.mark.parametrize("fields", [DENSE, SPARSE], ids=["dense", "sparse"])
@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_what_fits_is_not_refused(precision: str, fields: dict[str, Any], tensor: int):
    parallel = {"processes": tensor, "tensor": tensor, "expert_tensor": 1 if fields is SPARSE else None}
    assert said(run_of(precision, parallel=parallel), fields) == []
    assert said(run_of("bf16"), DENSE | {"intermediate_size": 72}) == []


def test_rules_of_a_run_have_them():
    config = run_of("fp8-blockwise")
    found = [str(one) for one in broken_setting_rules(config, shape_of(DENSE | {"intermediate_size": 72}))]
    assert any("gives mlp.linear_fc2 72 inputs" in one for one in found)


@pytest.mark.parametrize(
    ("precision", "capability", "messages"),
    [
        *((precision, (9, 0), []) for precision in ALL_RECIPES),
        *((precision, (12, 0), []) for precision in ALL_RECIPES),
        ("fp8-delayed", (8, 9), []),
        ("bf16", (7, 0), []),
        (
            "fp8-blockwise",
            (8, 9),
            [
                "precision=fp8-blockwise: needs GPUs of compute capability 9.0 or more, not 8.9. "
                "Fix: set precision=bf16 or fp8-tensorwise."
            ],
        ),
        (
            "fp8-delayed",
            (8, 0),
            ["precision=fp8-delayed: needs GPUs of compute capability 8.9 or more, not 8.0. Fix: set precision=bf16."],
        ),
    ],
)
def test_gpus(precision: str, capability: tuple[int, int], messages: list[str]):
    assert [str(one) for one in fp8_rules.on_gpu(run_of(precision), capability)] == messages


def test_weights_in_fp8_on_the_cpu():
    assert list(fp8_rules.on_cpu(run_of("fp8-blockwise", fp8={"param": True}))) == []
    assert [str(one) for one in fp8_rules.on_cpu(run_of("fp8-delayed", fp8={"param": True}))] == [
        "fp8.param=true with precision=fp8-delayed on the CPU: is not possible: weights are in bf16 there, which FP8's "
        "values fit with powers of two as scales alone. Fix: remove it, or set precision=fp8-blockwise."
    ]


LIBRARIES: dict[str, Any] = {"engine": "2.11.0", "cuda": "13.0", "fp32_scales": False}


@pytest.mark.parametrize(
    ("precision", "libraries", "messages"),
    [
        *((precision, {}, []) for precision in ALL_RECIPES),
        ("bf16", {"engine": None}, []),
        (
            "fp8-blockwise",
            {"engine": "2.2.1"},
            [
                "precision=fp8-blockwise: needs Transformer Engine 2.3 or later, and 2.2.1 is installed. "
                "Fix: install it."
            ],
        ),
        (
            "fp8-tensorwise",
            {"engine": None},
            [
                "precision=fp8-tensorwise: needs Transformer Engine 2.2 or later, and none is installed. "
                "Fix: install it."
            ],
        ),
        (
            "fp8-blockwise",
            {"cuda": "12.8"},
            [
                "precision=fp8-blockwise: needs CUDA 12.9 or later, and torch was built with 12.8. "
                "Fix: set precision=fp8-tensorwise."
            ],
        ),
        (
            "fp8-blockwise",
            {"fp32_scales": True},
            [
                "NVTE_FP8_BLOCK_SCALING_FP32_SCALES: must not be 1 with precision=fp8-blockwise, whose scales are "
                "powers of two. Fix: unset it."
            ],
        ),
    ],
)
def test_libraries(precision: str, libraries: dict[str, Any], messages: list[str]):
    assert [str(one) for one in fp8_rules.of_libraries(run_of(precision), **LIBRARIES | libraries)] == messages


def test_what_megatron_is_told_on_a_gpu(monkeypatch: pytest.MonkeyPatch):
    """Its own checks pass, and the fields are those of the recipe."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megarl.policy import megatron_config

    fields = ("fp8", "fp8_recipe", "fp8_param", "first_last_layers_bf16", "num_layers_at_start_in_bf16",
              "num_layers_at_end_in_bf16", "fp8_amax_history_len", "fp8_amax_compute_algo", "fp8_margin")  # fmt: skip

    def told(precision: str, **settings: Any) -> tuple[Any, ...]:
        # Fusions ask for Transformer Engine.
        run = run_of(precision, fp8=settings, megatron={"apply_rope_fusion": False})
        config = megatron_config.transformer_config(run, shape_of(DENSE))
        assert config.params_dtype == torch.bfloat16 and config.bf16
        return tuple(getattr(config, name) for name in fields)

    none = tuple(TransformerConfig.__dataclass_fields__[name].default for name in fields)
    assert told("fp8-blockwise") == none
    monkeypatch.setattr(megatron_config, "has_cuda", lambda: True)
    assert told("bf16") == none
    assert told("fp8-tensorwise", num_layers_at_end_in_bf16=2) == (
        "hybrid", "tensorwise", False, True, 0, 2, 1024, "max", 0,
    )  # fmt: skip
    history = {"amax_history_len": 4, "amax_compute_algo": "most_recent", "margin": 1}
    assert told("fp8-delayed", **history) == ("hybrid", "delayed", False, False, 0, 0, 4, "most_recent", 1)
    assert told("fp8-blockwise", param=True) == ("e4m3", "blockwise", True, False, 0, 0, 1024, "max", 0)


@pytest.mark.parametrize(("context", "sequence_parallel"), [(1, 1), (2, 1), (1, 4), (3, 2)])
def test_every_rank_has_a_multiple_of_16_tokens(context: int, sequence_parallel: int):
    """After both cuts; and context parallelism can still cut each sequence in two pieces a rank."""
    cut = Cut(context, 0, sequence_parallel, token_multiple=16)
    assert cut.width_multiple % (16 * context * sequence_parallel) == 0
    assert cut.width_multiple % (2 * context if context > 1 else 1) == 0
