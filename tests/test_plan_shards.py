"""The shards of a rehearsal: every rank's, the model's exact count, and nothing of the fake world left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megarl.config.grid import chunks_of_stage
from megarl.config.model_shape import ModelShape, model_shape_from_hf, read_model_shape
from megarl.config.schema import RunConfig
from megarl.errors import MegarlError
from megarl.parallel.fake_world import rank_of_fake_world
from megarl.policy.megatron_config import transformer_config
from megarl.policy.model import build_model
from megarl.rehearsal.shards import count_parameters, kind_of, shards_of
from megarl.reshard.adapter_map import adapters_of
from megarl.reshard.weight_map import padded_vocab_size

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
#: Parameters that the models' cards give, in thousands of millions, and what config.json makes of it exactly.
PUBLISHED = {
    "Qwen2.5-32B": (32.76, 32_763_876_352),
    "Qwen2.5-72B": (72.7, 72_706_203_648),
    "Qwen3-30B-A3B": (30.5, 30_532_122_624),
    "Qwen3-235B-A22B": (235.09, 235_093_634_560),
}
#: A mixture of 671 thousand million parameters, for planning alone: 3 dense layers of 61.
MIXTURE_671B: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 18432,
    "vocab_size": 129280,
    "max_position_embeddings": 163840,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "norm_topk_prob": True,
    "mlp_only_layers": [0, 1, 2],
}
TINY: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 301,
}
EXPERTS: dict[str, Any] = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "mlp_only_layers": [0],
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen2-tied": TINY | {"tie_word_embeddings": True},
    "llama": TINY | {"model_type": "llama"},
    "qwen3": TINY | {"model_type": "qwen3", "head_dim": 16},
    "qwen2-moe": TINY | EXPERTS | {"model_type": "qwen2_moe", "shared_expert_intermediate_size": 48},
    "qwen3-moe": TINY | EXPERTS | {"model_type": "qwen3_moe", "head_dim": 16},
}
SP = {"tensor": 2, "sequence": True}
LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (8, {"tensor": 8}),
    (8, SP | {"pipeline": 2, "context": 2}),
    (12, SP | {"pipeline": 3}),
    (12, {"pipeline": 2, "virtual_pipeline": 3}),
    (8, {"pipeline": 4, "account_for_embedding": True, "account_for_loss": True}),
    (6, {"pipeline": 3, "stage_layers": (1, 2, 3)}),
]
EXPERT_LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (16, SP | {"pipeline": 2, "expert": 8, "expert_tensor": 1}),
    (16, SP | {"expert": 4, "expert_tensor": 4}),
    (8, {"pipeline": 2, "virtual_pipeline": 3, "expert": 2, "expert_tensor": 2}),
]


def run_of(parallel: dict[str, Any], **sections: Any) -> RunConfig:
    return RunConfig.model_validate(
        sections
        | {
            "name": "case",
            "steps": 1,
            "model": {"path": "unused"},
            "algorithm": {"name": "grpo"},
            "data": {"path": "unused"},
            "parallel": parallel,
        }
    )


@pytest.mark.parametrize("model", MODELS)
def test_shards_add_up_to_the_model_under_every_layout(model: str) -> None:
    shape = model_shape_from_hf(MODELS[model])
    for world, parallel in LAYOUTS + (EXPERT_LAYOUTS if shape.is_moe else []):
        if shape.is_moe and parallel.get("tensor", 1) > 1:
            parallel = parallel | {"sequence": True}
        config = run_of(parallel)
        counted = count_parameters(shape, shards_of(config, shape, world))
        assert counted.counted == counted.exact == sum(counted.by_kind.values()), parallel
        stages = sorted(stage for one in counted.stages for stage in one.stages)
        assert stages == list(range(config.parallel.pipeline))


@pytest.mark.parametrize("model", MODELS)
def test_an_adapter_alone_has_its_own_parameters_in_buffers_and_the_base_none(model: str) -> None:
    shape, rank = model_shape_from_hf(MODELS[model]), 4
    adapter = {"rank": rank, "targets": ("q_proj", "up_proj", "down_proj")}
    config = run_of({"pipeline": 2}, parameters="adapter", adapter=adapter)
    shards = shards_of(config, shape, 4)
    wanted = sum(rank * sum(sizes) for sizes in adapters_of(shape, config.adapter.targets).values())
    assert sum(shard.adapter for shard in shards) == wanted
    assert count_parameters(shape, shards).counted == sum(shard.frozen for shard in shards) - tied_copy(shape)
    assert max(shard.merged for shard in shards) == 2 * shape.ffn_size * shape.hidden_size
    for shard in shards:
        assert shard.buffers == ()
        assert shard.adapter <= sum(one.numel for one in shard.adapter_buffers) < shard.adapter + 64 * 4 * 6 * 30


def tied_copy(shape: ModelShape) -> int:
    """Elements of the embedding that the last of several stages has once more, and of padding of the vocabulary."""
    padded = padded_vocab_size(shape.vocab_size)
    return (2 * padded - (1 if shape.tied_embeddings else 2) * shape.vocab_size) * shape.hidden_size


@pytest.mark.parametrize(
    ("model", "world", "parallel"),
    [
        ("qwen2-tied", 8, {"tensor": 2, "pipeline": 2, "context": 2}),
        ("qwen3-moe", 8, SP | {"pipeline": 2, "expert": 4, "expert_tensor": 1}),
    ],
)
def test_all_ranks_of_a_stage_hold_what_the_one_that_was_built_holds(
    model: str, world: int, parallel: dict[str, Any]
) -> None:
    shape, config = model_shape_from_hf(MODELS[model]), run_of(parallel)
    shards = shards_of(config, shape, world)
    for rank in range(world):
        with rank_of_fake_world(rank, world, config.parallel) as grid:
            chunks = chunks_of_stage(shape.num_layers, config.parallel, grid.pipeline_rank)
            models = build_model(transformer_config(config, shape), shape, chunks)
            found: dict[str, int] = {}
            for name, parameter in models[0].named_parameters():
                assert parameter.device.type == "meta"
                found[kind_of(name)] = found.get(kind_of(name), 0) + parameter.numel()
        assert found == shards[grid.pipeline_rank].by_kind, rank


@pytest.mark.parametrize("model", PUBLISHED)
def test_real_models_have_their_published_sizes(model: str) -> None:
    published, exact = PUBLISHED[model]
    shape = read_model_shape(CONFIGS / "models" / model)
    parallel = SP | {"pipeline": 2} | ({"expert": 8, "expert_tensor": 1} if shape.is_moe else {})
    counted = count_parameters(shape, shards_of(run_of(parallel), shape, 64))
    assert counted.counted == counted.exact == exact
    assert abs(exact / 1e9 - published) < 0.05


def test_a_mixture_of_671_thousand_million_on_2048_ranks() -> None:
    shape = model_shape_from_hf(MIXTURE_671B)
    layers = [3, *[4] * 14, 2]
    parallel = {"tensor": 8, "sequence": True, "pipeline": 16, "stage_layers": layers, "expert": 64, "expert_tensor": 1}
    shards = shards_of(run_of(parallel), shape, 2048)
    counted = count_parameters(shape, shards)
    assert counted.counted == counted.exact
    assert 6.5e11 < counted.exact < 6.9e11
    # Four experts of 3 x 7168 x 2048 in each of four layers.
    assert shards[1].by_kind["experts"] == 4 * 4 * 3 * 7168 * 2048
    # The three dense layers stand alone.
    assert "experts" not in shards[0].by_kind
    assert counted.by_kind["dense mlp"] == 3 * 3 * 7168 * 18432


def test_a_count_that_is_not_the_models_is_an_error() -> None:
    config, shape = run_of({"tensor": 2}), model_shape_from_hf(MODELS["llama"])
    shards = shards_of(config, shape, 2)
    other = model_shape_from_hf(MODELS["llama"] | {"vocab_size": 302})
    with pytest.raises(MegarlError, match=r"hold [\d,]+ parameters, the model has"):
        count_parameters(other, shards)


def test_the_fake_world_leaves_nothing_behind() -> None:
    shape: ModelShape = model_shape_from_hf(MODELS["qwen2-tied"])
    state = torch.get_rng_state()
    shards_of(run_of({"tensor": 4}), shape, 64)
    assert not dist.is_initialized()
    assert not parallel_state.is_initialized()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.zeros(2).device.type == "cpu"


def test_a_process_of_a_real_world_is_left_alone(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with (
            pytest.raises(MegarlError, match="has not joined a world"),
            rank_of_fake_world(0, 2, run_of({}).parallel),
        ):
            pass
        assert dist.get_backend() == "gloo"
    finally:
        dist.destroy_process_group()


def test_kinds_cover_every_name_that_megatron_gives() -> None:
    for name in MODELS:
        shape = model_shape_from_hf(MODELS[name])
        (shard,) = shards_of(run_of({}), shape, 1)
        expected = {"norms", "embedding", "attention", "dense mlp"}
        expected |= set() if shape.tied_embeddings else {"head"}
        expected |= {"experts", "router"} if shape.is_moe else set()
        expected |= {"shared experts"} if shape.shared_expert_ffn_size else set()
        assert set(shard.by_kind) == expected
