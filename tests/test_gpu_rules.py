"""What a run may ask for on the CPU and not on a GPU, with its exact message."""

from __future__ import annotations

from typing import Any

import pytest
from config_case import MODEL, config_with

from megarl.config import gpu_rules
from megarl.config.model_shape import model_shape_from_hf
from megarl.config.schema import RunConfig


def refused(config: RunConfig, hidden: int = 128, capability: tuple[int, int] = gpu_rules.HOPPER) -> list[str]:
    shape = model_shape_from_hf(MODEL | {"hidden_size": hidden, "num_attention_heads": 4})
    return [str(refusal) for refusal in gpu_rules.refusals(config, shape, capability)]


@pytest.mark.parametrize(
    ("sections", "messages"),
    [
        ({"precision": "bf16", "batch": {"packed": True}, "parallel": {"context": 2}}, []),
        ({"precision": "fp32", "batch": {"packed": False}}, []),
        (
            {"precision": "fp32", "batch": {"packed": False}, "parallel": {"context": 2}},
            [
                "precision=fp32 with parallel.context=2 on a GPU: has no attention kernel in Transformer Engine. "
                "Fix: set precision=bf16 or parallel.context=1."
            ],
        ),
        ({"precision": "fp8-blockwise", "deterministic": True, "fp8": {"param": True}}, []),
        ({"precision": "fp8-delayed", "deterministic": True}, []),
        (
            {"precision": "fp8-delayed", "deterministic": True, "fp8": {"param": True}},
            [
                "fp8.param=true with precision=fp8-delayed and deterministic=true on a GPU: cannot resume to the last "
                "bit: checkpoints have bf16 weights, which FP8's values fit with powers of two as scales alone. "
                "Fix: remove fp8.param, set precision=fp8-blockwise, or deterministic=false."
            ],
        ),
        ({"moe": {"routing_replay": "on"}}, []),
        ({"moe": {"routing_replay": "compare"}, "rollout": {"tensor": 4, "max_tokens": 64}}, []),
        (
            {"moe": {"routing_replay": "on"}, "vllm": {"async_scheduling": True}},
            [
                "vllm.async_scheduling=true: must be off where routing is recorded: a step would still be under way "
                "when prefixes are forgotten. Fix: remove it, or do not record the routing."
            ],
        ),
        (
            {"deterministic": True, "rollout": {"keep_unfinished": True}},
            [
                "rollout.keep_unfinished=true with deterministic=true on a GPU: makes the rest of a step's samples "
                "without those that are kept, and so with other bits. Fix: remove it, or set deterministic=false."
            ],
        ),
        (
            {"precision": "fp32", "batch": {"packed": True}, "parallel": {"context": 4}},
            [
                "precision=fp32 with batch.packed=true on a GPU: has no attention kernel in Transformer Engine. "
                "Fix: set precision=bf16 or batch.packed=false.",
                "precision=fp32 with parallel.context=4 on a GPU: has no attention kernel in Transformer Engine. "
                "Fix: set precision=bf16 or parallel.context=1.",
            ],
        ),
    ],
)
def test_what_a_gpu_cannot_do_is_refused(sections: dict[str, Any], messages: list[str]) -> None:
    assert refused(config_with(**sections)) == messages


@pytest.mark.parametrize(
    ("capability", "sections", "messages"),
    [
        ((8, 0), {"precision": "bf16", "rollout": {"precision": "bf16"}}, []),
        (
            (8, 0),
            {"deterministic": True},
            [
                "deterministic=true on a GPU of compute capability 8.0: Transformer Engine's attention has a backward "
                "pass that repeats on 9.0 (Hopper) alone. Fix: set deterministic=false."
            ],
        ),
        (
            (10, 0),
            {"deterministic": True, "precision": "fp8-blockwise", "rollout": {"precision": "fp8"}},
            [
                "deterministic=true on a GPU of compute capability 10.0: Transformer Engine's attention has a backward "
                "pass that repeats on 9.0 (Hopper) alone. Fix: set deterministic=false.",
                "rollout.precision=fp8 on a GPU of compute capability 10.0: needs 9.0 (Hopper), where vLLM keeps FP8 "
                "blocks as they are pushed. Fix: set rollout.precision=bf16.",
            ],
        ),
        ((8, 9), {"precision": "fp8-tensorwise"}, []),
        (
            (8, 9),
            {"precision": "fp8-blockwise"},
            [
                "precision=fp8-blockwise: needs GPUs of compute capability 9.0 or more, not 8.9. "
                "Fix: set precision=bf16 or fp8-tensorwise."
            ],
        ),
    ],
)
def test_what_a_gpu_of_another_kind_cannot_do(
    capability: tuple[int, int], sections: dict[str, Any], messages: list[str]
) -> None:
    assert refused(config_with(**sections), capability=capability) == messages


@pytest.mark.parametrize(
    ("hidden", "precision", "vllm", "messages"),
    [
        (128, "fp8", {"moe_backend": "triton", "linear_backend": "auto"}, []),
        (192, "bf16", {"moe_backend": "marlin"}, []),
        (
            192,
            "fp8",
            {},
            [
                "rollout.precision=fp8 on a GPU: needs a hidden_size that is a multiple of 128, not 192. "
                "Fix: set rollout.precision=bf16."
            ],
        ),
        (
            128,
            "fp8",
            {"moe_backend": "flashinfer_cutlass", "linear_backend": "marlin"},
            [
                "vllm.linear_backend=marlin: must be auto, cutlass, deep_gemm or triton with rollout.precision=fp8: "
                "other kernels keep weights in an order of their own. Fix: remove vllm.linear_backend, or set "
                "rollout.precision=bf16.",
                "vllm.moe_backend=flashinfer_cutlass: must be triton with rollout.precision=fp8: other kernels keep "
                "weights in an order of their own. Fix: remove vllm.moe_backend, or set rollout.precision=bf16.",
            ],
        ),
    ],
)
def test_what_kernels_of_an_fp8_engine_take(hidden: int, precision: str, vllm: dict[str, Any], messages: list[str]):
    config = config_with(rollout={"max_tokens": 64, "precision": precision}, vllm=vllm)
    assert refused(config, hidden) == messages
