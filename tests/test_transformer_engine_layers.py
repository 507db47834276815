"""The policy of Transformer Engine's layers beside that of the CPU's, without memory and without a GPU.

Needs Transformer Engine, so an environment of the GPU lock: see tests/test_gpu_lock.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from config_case import DENSE, SPARSE, config_with
from test_configs import CONFIGS, GPUS, write_files

from megarl.config import accelerations
from megarl.config.grid import chunks_of_stage
from megarl.config.load import load_config
from megarl.config.model_shape import ModelShape, model_shape_from_hf, read_model_shape
from megarl.config.schema import RunConfig
from megarl.formats import megatron
from megarl.parallel.fake_world import rank_of_fake_world
from megarl.policy.megatron_config import transformer_config
from megarl.policy.model import build_model, fuse_weight_gradients, is_expert

pytestmark = pytest.mark.skipif(
    not accelerations.has_extension(), reason="needs Transformer Engine: an environment of requirements/gpu.lock"
)

#: Layouts beside those of the files, of the mixtures.
MORE = {
    "grpo_qwen3_30b_a3b": [
        ("parallel.expert=2", "parallel.expert_tensor=2"),
        ("parallel.expert=1", "parallel.expert_tensor=1"),
    ],
    "grpo_qwen2.5_32b_16k": [("parallel.sequence=false", "parallel.context=1")],
}
CASES = [(name, overrides) for name in sorted(GPUS) for overrides in [(), *MORE.get(name, [])]]


def build(config: RunConfig, shape: ModelShape, world: int, stage: int, engine: bool) -> dict[str, Any]:
    """What a rank of `stage` holds, in Transformer Engine's layers or the CPU's: parameters by name with what Megatron
    goes by, and the tensors of its checkpoint by key with their places."""
    rank = stage * (world // config.parallel.pipeline)
    with rank_of_fake_world(rank, world, config.parallel), pytest.MonkeyPatch.context() as patch:
        # By this megarl chooses its layers, and without it Transformer Engine makes none.
        patch.setattr("torch.cuda.is_available", lambda: engine)
        if engine:
            patch.setattr("torch.cuda.current_device", lambda: 0)
        chunks = chunks_of_stage(shape.num_layers, config.parallel, stage)
        models = build_model(transformer_config(config, shape), shape, chunks)
        assert any("transformer_engine" in type(one).__module__ for one in models[0].modules()) == engine
        found: dict[str, Any] = {}
        for number, one in enumerate(models):
            found |= {f"{number} {name}": value for name, value in parameters_of(one)}
            found |= {f"{number} saved as {key}": value for key, value in saved_of(one)}
        return found


def parameters_of(chunk: torch.nn.Module) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, parameter in chunk.named_parameters():
        assert parameter.device.type == "meta", name
        yield (
            name,
            {
                "shape": tuple(parameter.shape),
                "dtype": parameter.dtype,
                # Which gradients are summed over which ranks, and which are counted once in the norm.
                "tensor parallel": getattr(parameter, "tensor_model_parallel", False),
                "sequence parallel": getattr(parameter, "sequence_parallel", False),
                "expert": is_expert(parameter),
            },
        )


def saved_of(chunk: Any) -> Iterator[tuple[str, Any]]:
    for name, one in chunk.sharded_state_dict(metadata=dict(megatron.CONTENT)).items():
        if megatron.is_extra_state(name):
            continue
        place = ("key", "local_shape", "global_shape", "global_offset", "axis_fragmentations", "replica_id")
        yield name, {field: getattr(one, field, None) for field in place}


@pytest.mark.parametrize(("name", "overrides"), CASES, ids=[" ".join((name, *more)) for name, more in CASES])
def test_both_kinds_of_layers_hold_and_save_the_same(
    name: str, overrides: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(CONFIGS / f"{name}.yaml", overrides)
    monkeypatch.chdir(tmp_path)
    write_files(config)
    shape = read_model_shape(config.model.path)
    for stage in {0, config.parallel.pipeline - 1}:
        engine, cpu = (build(config, shape, GPUS[name], stage, kind) for kind in (True, False))
        assert engine == cpu
        assert len(engine) > shape.num_layers


@pytest.mark.parametrize("fields", [DENSE, SPARSE], ids=["dense", "sparse"])
def test_linear_layers_of_decoder_layers_add_up_their_weights_gradients_themselves(fields: dict[str, Any]) -> None:
    """And no other layer: what else has a weight, has its gradient added by Megatron's hooks."""
    config, shape = config_with(), model_shape_from_hf(fields)
    with rank_of_fake_world(0, 1, config.parallel), pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.cuda.is_available", lambda: True)
        patch.setattr("torch.cuda.current_device", lambda: 0)
        models = build_model(transformer_config(config, shape), shape, chunks_of_stage(4, config.parallel, 0))
        asked = {name for name, one in models[0].named_modules() if getattr(one, "fuse_wgrad_accumulation", False)}
        assert asked == set()
        fuse_weight_gradients(models)
        asked = {name for name, one in models[0].named_modules() if getattr(one, "fuse_wgrad_accumulation", False)}
    attention = {"self_attention.linear_qkv", "self_attention.linear_proj"}
    mlps = ("mlp.experts", "mlp.shared_experts") if shape.is_moe else ("mlp",)
    layers = attention | {f"{mlp}.linear_fc{number}" for mlp in mlps for number in (1, 2)}
    assert asked == {f"decoder.layers.{number}.{layer}" for number in range(4) for layer in layers}
    others = {name for name, _ in models[0].named_parameters() if name.rpartition(".")[0] not in asked}
    kinds = {name.rpartition(".")[0].rpartition(".")[2] for name in others}
    assert kinds == {"word_embeddings", "final_layernorm", "output_layer"} | (
        {"router", "pre_mlp_layernorm", "shared_experts"} if shape.is_moe else set()
    )
