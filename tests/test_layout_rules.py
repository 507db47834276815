"""What fits with what: every refusal with its message, and layouts beside them that must pass."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from config_case import MODEL

from megarl.config.grid import Chunk, Grid, chunks_of_stage, grid_of_rank, layers_of_chunks
from megarl.config.load import load_config
from megarl.config.model_shape import ModelShape, model_shape_from_hf
from megarl.config.rules import broken_rules
from megarl.config.sections import ParallelSettings
from megarl.config.splits import engine_refusals, policy_refusals
from megarl.errors import Refusal

#: 6 experts of 36 rows, 2 to a token; 24 rows of a shared expert; layer 0 is dense.
EXPERTS: dict[str, Any] = MODEL | {
    "model_type": "qwen2_moe",
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 36,
    "shared_expert_intermediate_size": 24,
    "mlp_only_layers": [0],
}
DENSE, MOE = model_shape_from_hf(MODEL), model_shape_from_hf(EXPERTS)


def messages(run_file: Path, overrides: str, shape: ModelShape) -> list[str]:
    return [str(refusal) for refusal in broken_rules(load_config(run_file, overrides.split()), shape)]


@pytest.mark.parametrize(
    ("shape", "overrides", "message"),
    [
        (
            DENSE,
            "parallel.virtual_pipeline=2",
            "parallel.virtual_pipeline=2: needs parallel.pipeline > 1. "
            "Fix: set parallel.pipeline to 2 or more, or remove parallel.virtual_pipeline.",
        ),
        (
            DENSE,
            "parallel.processes=2 parallel.pipeline=2 parallel.virtual_pipeline=2",
            "parallel.pipeline x parallel.virtual_pipeline=4: must divide the model's 6 layers. "
            "Fix: use 1, 2, 3 or 6, or write the layers of each stage as parallel.stage_layers.",
        ),
        (
            DENSE,
            "parallel.processes=2 parallel.pipeline=2 parallel.account_for_loss=true",
            "parallel.pipeline=2: must divide the model's 7 layers (embedding or loss counted). "
            "Fix: use 1 or 7, or write the layers of each stage as parallel.stage_layers.",
        ),
        (
            DENSE,
            "parallel.processes=7 parallel.pipeline=7 parallel.account_for_loss=true",
            "parallel.pipeline=7: leaves a stage without a layer: 1, 1, 1, 1, 1, 1, 0. "
            "Fix: use fewer stages, or do not count the embedding or the loss as a layer.",
        ),
        (
            DENSE,
            "parallel.processes=2 parallel.pipeline=2 parallel.stage_layers=[2,3]",
            "parallel.stage_layers=[2, 3]: must add up to the model's 6 layers, not 5. Fix: correct the numbers.",
        ),
        (
            DENSE,
            "parallel.processes=2 parallel.pipeline=2 parallel.stage_layers=[6]",
            "parallel.stage_layers=[6]: must have parallel.pipeline = 2 numbers. Fix: write 2 numbers.",
        ),
        (
            DENSE,
            "parallel.processes=2 parallel.pipeline=2 parallel.stage_layers=[2,4] parallel.account_for_loss=true",
            "parallel.stage_layers=[2, 4]: says each stage's layers already. "
            "Fix: remove parallel.account_for_embedding and parallel.account_for_loss.",
        ),
        (
            DENSE,
            "parallel.processes=8 parallel.context=8 megatron.cp_comm_type=a2a batch.prompts=16",
            "megatron.cp_comm_type=a2a: needs attention heads that parallel.tensor x parallel.context = 8 divides, "
            "not 12. Fix: remove it (p2p needs none), or lower parallel.context.",
        ),
        (
            DENSE,
            "parallel.processes=2 parallel.expert=2",
            "parallel.expert=2: is for mixtures of experts, and a qwen2 model is dense. Fix: remove parallel.expert.",
        ),
        (
            DENSE,
            "parallel.processes=2 parallel.expert_tensor=2",
            "parallel.expert_tensor=2: is for mixtures of experts, and a qwen2 model is dense. "
            "Fix: remove parallel.expert_tensor.",
        ),
        (
            DENSE,
            "moe.aux_loss_coefficient=0.001",
            "moe.aux_loss_coefficient=0.001: is for mixtures of experts, and a qwen2 model is dense. "
            "Fix: remove moe.aux_loss_coefficient.",
        ),
        (
            DENSE,
            "moe.routing_replay=on",
            "moe.routing_replay=on: is for mixtures of experts, and a qwen2 model is dense. "
            "Fix: remove moe.routing_replay.",
        ),
        (
            DENSE,
            "recompute.kind=selective recompute.modules=[core_attn,moe]",
            "recompute.modules=moe: must be among core_attn, layernorm, mlp for a qwen2 model. "
            "Fix: remove it, or name one of these.",
        ),
        (
            DENSE,
            "parallel.processes=2 parallel.pipeline=2 parallel.stage_layers=[2,4] recompute.kind=full "
            "recompute.layers=3",
            "recompute.layers=3: must not exceed the 2 layers of the smallest pipeline stage. Fix: use at most 2.",
        ),
        (
            DENSE,
            "parallel.processes=2 parallel.context=2 batch.tokens_per_microbatch=127 data.max_prompt_tokens=63",
            "batch.tokens_per_microbatch=127: must hold the longest sequence, data.max_prompt_tokens + "
            "rollout.max_tokens up to a multiple of 2 x parallel.context = 4 = 128. Fix: use 128 or more.",
        ),
        (
            MOE,
            "parallel.processes=4 parallel.expert=4",
            "parallel.expert=4: must divide the model's 6 experts. Fix: use 1, 2, 3 or 6.",
        ),
        (
            MOE,
            "parallel.processes=5 parallel.expert_tensor=5",
            "parallel.expert_tensor=5: must divide the 36 rows of an expert's MLP. "
            "Fix: set parallel.expert_tensor to 1, 2, 3, 4, 6 or 12.",
        ),
        (
            MOE,
            "parallel.processes=2 parallel.tensor=2",
            "parallel.tensor=2 without parallel.sequence: is not possible for a mixture of experts: Megatron "
            "dispatches each token from one rank. Fix: set parallel.sequence=true.",
        ),
        (
            MOE,
            "parallel.processes=4 parallel.tensor=2 parallel.sequence=true parallel.expert=3",
            "parallel.expert=3 with expert tensor parallelism 2: must together divide the 4 processes of a pipeline "
            "stage. Fix: lower parallel.expert or parallel.expert_tensor, or use more processes.",
        ),
        (
            MOE,
            "moe.routing_replay=on algorithm=sft data.solution_column=solution",
            "moe.routing_replay=on: needs an algorithm that generates: the experts are those of the engine. "
            "Fix: remove it.",
        ),
        (
            MOE,
            "moe.routing_replay=compare vllm.enable_prefix_caching=false",
            "vllm.enable_prefix_caching=false: must be left on where routing is recorded, which vLLM keeps by cached "
            "block. Fix: remove it, or set moe.routing_replay=off.",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and "=" in value and ":" not in value else "",
)
def test_refused(run_file: Path, shape: ModelShape, overrides: str, message: str) -> None:
    found = messages(run_file, overrides, shape)
    assert found and found[0] == message


@pytest.mark.parametrize(
    ("shape", "overrides"),
    [
        (DENSE, "parallel.processes=2 parallel.context=2"),
        (DENSE, "parallel.processes=3 parallel.pipeline=3 parallel.virtual_pipeline=2"),
        (DENSE, "parallel.processes=2 parallel.pipeline=2 parallel.stage_layers=[1,5]"),
        (
            DENSE,
            "parallel.processes=2 parallel.pipeline=2 parallel.account_for_loss=true "
            "parallel.account_for_embedding=true",
        ),
        (DENSE, "parallel.processes=6 parallel.context=6 megatron.cp_comm_type=a2a"),
        (DENSE, "recompute.kind=selective recompute.modules=[core_attn,mlp]"),
        (DENSE, "recompute.kind=full recompute.layers=6"),
        (MOE, "parallel.processes=6 parallel.expert=6"),
        (MOE, "parallel.processes=6 parallel.expert=3 parallel.expert_tensor=2"),
        (MOE, "parallel.processes=4 parallel.tensor=2 parallel.sequence=true parallel.expert=2"),
        (MOE, "moe.aux_loss_coefficient=0.001 moe.routing_replay=on"),
        (MOE, "recompute.kind=selective recompute.modules=[core_attn,moe]"),
    ],
)
def test_allowed(run_file: Path, shape: ModelShape, overrides: str) -> None:
    assert messages(run_file, overrides, shape) == []


@pytest.mark.parametrize(
    ("shape", "parallel", "message"),
    [
        (
            DENSE,
            {"tensor": 5},
            "parallel.tensor=5: must divide the model's 12 attention heads. Fix: use 1, 2, 3, 4, 6 or 12.",
        ),
        (DENSE, {"tensor": 3}, "the model's 4 key-value heads or be a multiple of them. Fix: use 1, 2, 4 or 12."),
        (
            DENSE,
            {"tensor": 12},
            "parallel.tensor=12: must divide the 20 fused rows of the model's queries, keys and "
            "values. Fix: use 1, 2 or 4.",
        ),
        (MOE, {"expert": 5}, "parallel.expert=5: must divide the model's 6 experts. Fix: use 1, 2, 3 or 6."),
    ],
)
def test_what_cuts_no_policy(shape: ModelShape, parallel: dict[str, Any], message: str) -> None:
    found = policy_refusals(replace(shape, head_dim=1), ParallelSettings(**parallel))
    assert message in str(next(found))


@pytest.mark.parametrize(
    ("shape", "tensor", "message"),
    [
        (DENSE, 12, "vocabulary of 300, padded by vLLM to 320. Fix: use a power of two."),
        (replace(DENSE, ffn_size=98), 4, "must divide the model's MLP size of 98. Fix: use 1 or 2."),
        (replace(MOE, expert_ffn_size=26), 4, "must divide the 26 rows of an expert's MLP. Fix: use 1 or 2."),
        (
            replace(MOE, shared_expert_ffn_size=42),
            4,
            "must divide the 42 rows of the shared expert's MLP. Fix: use 1, 2, 3 or 6.",
        ),
        (replace(MOE, num_experts=3), 4, "must be at most the model's 3 experts, as vLLM wants it. Fix: lower it."),
    ],
)
def test_what_cuts_no_engine(shape: ModelShape, tensor: int, message: str) -> None:
    assert str(next(engine_refusals(shape, tensor))).endswith(message)


def test_more_ranks_than_key_value_heads() -> None:
    assert not list(policy_refusals(replace(DENSE, head_dim=6), ParallelSettings(tensor=12)))


def test_experts_alone_have_no_dense_mlp_to_cut() -> None:
    mixtral = MODEL | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    experts = replace(model_shape_from_hf(mixtral), expert_ffn_size=90)
    assert not list(policy_refusals(replace(experts, ffn_size=90), ParallelSettings(tensor=4, expert_tensor=2)))


def test_layers_of_chunks() -> None:
    def of(layers: int, **parallel: Any) -> tuple[int, ...]:
        return layers_of_chunks(layers, ParallelSettings(**parallel))

    assert of(6) == (6,)
    assert of(8, pipeline=2, virtual_pipeline=2) == (2, 2, 2, 2)
    assert of(6, pipeline=4, account_for_embedding=True, account_for_loss=True) == (1, 2, 2, 1)
    assert of(7, pipeline=4, account_for_loss=True) == (2, 2, 2, 1)
    assert of(6, pipeline=2, stage_layers=(1, 5)) == (1, 5)


def test_chunks_go_round_the_stages() -> None:
    parallel = ParallelSettings(pipeline=2, virtual_pipeline=2, stage_layers=(1, 2, 3, 4))
    assert chunks_of_stage(10, parallel, 0) == (Chunk(range(1), True, False), Chunk(range(3, 6), False, False))
    assert chunks_of_stage(10, parallel, 1) == (Chunk(range(1, 3), False, False), Chunk(range(6, 10), False, True))


def test_places_in_the_grid() -> None:
    parallel = ParallelSettings(tensor=2, context=2, pipeline=2, expert=4, expert_tensor=1)
    # 16 processes: two stages of eight; tensor varies fastest, then context, then data.
    place = grid_of_rank(13, 16, parallel)
    assert place == Grid(
        tensor=2,
        pipeline=2,
        context=2,
        data=2,
        expert=4,
        expert_tensor=1,
        tensor_rank=1,
        pipeline_rank=1,
        context_rank=0,
        data_rank=1,
        expert_rank=1,
        expert_tensor_rank=0,
    )
    assert place.is_last_stage and not place.reports and not place.experts_span_replicas
    assert [rank for rank in range(16) if grid_of_rank(rank, 16, parallel).reports] == [8, 12]


def test_configurations_of_mixtures() -> None:
    assert MOE.sparse_layers == (False, True, True, True, True, True)
    assert (MOE.num_experts, MOE.experts_per_token, MOE.expert_ffn_size, MOE.shared_expert_ffn_size) == (6, 2, 36, 24)
    assert not MOE.normalize_topk and MOE.router_aux_loss == 0.0 and MOE.is_moe and not DENSE.is_moe
    trained = model_shape_from_hf(EXPERTS | {"output_router_logits": True, "router_aux_loss_coef": 0.02})
    assert trained.router_aux_loss == 0.02
    stepped = model_shape_from_hf(EXPERTS | {"decoder_sparse_step": 2, "mlp_only_layers": [3]})
    assert stepped.sparse_layers == (False, True, False, False, False, True)
    third = {key: value for key, value in EXPERTS.items() if key != "shared_expert_intermediate_size"}
    third |= {"model_type": "qwen3_moe", "head_dim": 8}
    newer = {key: value for key, value in third.items() if key != "num_experts"} | {"num_local_experts": 6}
    assert model_shape_from_hf(newer) == model_shape_from_hf(third)
    mixtral = model_shape_from_hf(MODEL | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2})
    assert mixtral.normalize_topk and mixtral.expert_ffn_size == 96 and all(mixtral.sparse_layers)


def test_broken_configurations_of_mixtures() -> None:
    with pytest.raises(Refusal, match=r"num_experts_per_tok=7 in config\.json: must be between 1 and the 6 experts"):
        model_shape_from_hf(EXPERTS | {"num_experts_per_tok": 7})
    without = {key: value for key, value in EXPERTS.items() if key != "intermediate_size"}
    with pytest.raises(Refusal, match=r"config\.json without intermediate_size"):
        model_shape_from_hf(without)
    mixtral = MODEL | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    with pytest.raises(Refusal, match="sliding_window=64"):
        model_shape_from_hf(mixtral | {"sliding_window": 64})
