"""The `megatron:` and `vllm:` tables against those libraries' own dataclasses."""

from __future__ import annotations

import dataclasses
import re

import pytest

from megarl.config.vendor_fields import TABLES, refusals, vendor_fields
from megarl.config.vendor_owned import OWNED


def test_fields_read_from_source_are_those_of_the_classes() -> None:
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer.transformer_config import TransformerConfig
    from vllm import EngineArgs

    classes = (TransformerConfig, OptimizerConfig, DistributedDataParallelConfig)
    megatron = {field.name for each in classes for field in dataclasses.fields(each)}
    assert set(vendor_fields("megatron")) == megatron
    assert set(vendor_fields("vllm")) == {field.name for field in dataclasses.fields(EngineArgs)}


@pytest.mark.parametrize("table", TABLES)
def test_every_owned_option_exists(table: str) -> None:
    assert set(OWNED[table]) <= set(vendor_fields(table))


def test_every_option_of_fp8_and_fp4_is_owned() -> None:
    """Layers in FP8 whose weights are pushed and saved as if they were not would go wrong in silence."""
    low = re.compile(r"fp[48]|amax|_in_bf16$|_layers_bf16$|quant(?!ile)|kitchen|transpose_cache")
    # Megatron's own engine is not used.
    names = {name for name in vendor_fields("megatron") if not name.startswith("inference_")}
    assert {name for name in names if low.search(name)} - set(OWNED["megatron"]) == set()


def test_every_option_that_changes_how_weights_are_cut_or_laid_out_is_owned() -> None:
    """They are pushed, saved and converted by a map that knows one layout for each setting of megarl's."""
    layout = re.compile(r"_model_parallel_size$|weight_(shards|remat)|^(use_)?mup|interleave_|single_grouped|op_fuser")
    assert {name for name in vendor_fields("megatron") if layout.search(name)} - set(OWNED["megatron"]) == set()


def test_an_empty_table_reads_no_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: pytest.fail(f"looked for {name}"))
    vendor_fields.cache_clear()
    assert list(refusals("vllm", {})) == []


@pytest.mark.parametrize(
    ("table", "name", "value"),
    [
        ("megatron", "moe_expert_capacity_factor", None),
        ("megatron", "moe_router_num_groups", 2),
        ("megatron", "no_rope_freq", [1, 0]),
        ("megatron", "no_rope_freq", 2),
        ("megatron", "attention_backend", "flash"),
        ("megatron", "loss_scale", 1),
        ("megatron", "bucket_size", 1000),
        ("vllm", "enforce_eager", True),
        ("vllm", "block_size", None),
        ("vllm", "additional_config", {"a": 1}),
        ("vllm", "cpu_offload_gb", 4),
    ],
)
def test_passed_through(table: str, name: str, value: object) -> None:
    assert list(refusals(table, {name: value})) == []


@pytest.mark.parametrize(
    ("table", "name", "value", "message"),
    [
        (
            "megatron",
            "symmetric_ar_typ",
            "full",
            "megatron.symmetric_ar_typ: is not a field of TransformerConfig, ModelParallelConfig, OptimizerConfig "
            "or DistributedDataParallelConfig. Fix: use megatron.symmetric_ar_type.",
        ),
        (
            "megatron",
            "tensor_model_parallel_size",
            2,
            "megatron.tensor_model_parallel_size: is set by megarl. Fix: set parallel.tensor.",
        ),
        (
            "megatron",
            "hidden_size",
            2,
            "megatron.hidden_size: is set by megarl. Fix: change the model's config.json in model.path.",
        ),
        (
            "megatron",
            "moe_router_num_groups",
            "two",
            "megatron.moe_router_num_groups='two': must be of type Optional[int]. "
            "Fix: correct or remove megatron.moe_router_num_groups.",
        ),
        (
            "megatron",
            "symmetric_ar_type",
            "x",
            "megatron.symmetric_ar_type='x': must be of type "
            "Optional[Literal['two_shot', 'one_shot', 'multimem_all_reduce']]. "
            "Fix: correct or remove megatron.symmetric_ar_type.",
        ),
        ("megatron", "fp8", "hybrid", "megatron.fp8: is set by megarl. Fix: set precision."),
        ("megatron", "fp8", None, "megatron.fp8: is set by megarl. Fix: set precision."),
        ("megatron", "fp4_recipe", "nvfp4", "megatron.fp4_recipe: is set by megarl. Fix: set precision."),
        (
            "megatron",
            "tensor_parallel_num_weight_shards",
            4,
            "megatron.tensor_parallel_num_weight_shards: is set by megarl. Fix: set parallel.tensor.",
        ),
        (
            "megatron",
            "moe_mlp_glu_interleave_size",
            32,
            "megatron.moe_mlp_glu_interleave_size: is set by megarl. "
            "Fix: remove it; weights are pushed and saved as Megatron lays them out without it.",
        ),
        (
            "megatron",
            "moe_grad_scale_func",
            "scale",
            "megatron.moe_grad_scale_func='scale': is a Python function, which YAML cannot give. "
            "Fix: correct or remove megatron.moe_grad_scale_func.",
        ),
        (
            "megatron",
            "init_method",
            "normal",
            "megatron.init_method='normal': is a Python function, which YAML cannot give. "
            "Fix: correct or remove megatron.init_method.",
        ),
        (
            "megatron",
            "moe_router_num_groups",
            True,
            "megatron.moe_router_num_groups=True: must be of type Optional[int]. "
            "Fix: correct or remove megatron.moe_router_num_groups.",
        ),
        ("vllm", "enforce_egar", True, "vllm.enforce_egar: is not a field of EngineArgs. Fix: use vllm.enforce_eager."),
        (
            "vllm",
            "_api_process_rank",
            0,
            "vllm._api_process_rank: is not a field of EngineArgs. Fix: remove vllm._api_process_rank.",
        ),
        ("vllm", "tensor_parallel_size", 2, "vllm.tensor_parallel_size: is set by megarl. Fix: set rollout.tensor."),
        (
            "vllm",
            "enable_expert_parallel",
            True,
            "vllm.enable_expert_parallel: is set by megarl. Fix: set rollout.expert_parallel.",
        ),
        ("vllm", "dtype", "auto", "vllm.dtype: is set by megarl. Fix: set precision."),
        (
            "vllm",
            "block_size",
            "x",
            "vllm.block_size='x': must be of type int | None. Fix: correct or remove vllm.block_size.",
        ),
    ],
)
def test_refused(table: str, name: str, value: object, message: str) -> None:
    vendor_fields.cache_clear()
    assert [str(each) for each in refusals(table, {name: value})] == [message]
