"""What a rehearsal says of the policy against a real policy of one and two processes on the CPU.

Weights, gradients and the optimizer's state are those of Megatron's real buffers, to the byte. The formulas of what
layers keep are compared with what the real layers save. The layers for the CPU save more than Transformer Engine's,
each tensor of it known: `beyond` lists it. Formula and list together must be what PyTorch's hooks count, to the byte;
so every term of the formula is a tensor that is really kept. What Transformer Engine's layers keep is not measured.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import parity
import pytest
import saved_tensors

from megarl.config.grid import chunks_of_stage
from megarl.config.model_shape import ModelShape, read_model_shape
from megarl.config.schema import RunConfig
from megarl.rehearsal import memory
from megarl.rehearsal.activations import chunk_activations
from megarl.rehearsal.shards import shards_of

FP32 = 4
SP = {"tensor": 2, "sequence": True}
BOTH = {"kind": "selective", "modules": ("core_attn", "mlp")}
CASES: dict[int, list[tuple[str, dict[str, Any]]]] = {
    1: [
        ("qwen2-untied", {}),
        ("qwen3-untied", {}),
        ("qwen3-moe", {}),
        ("qwen2-moe", {}),
        ("qwen3-moe", {"recompute": {"kind": "full"}}),
        ("qwen2-untied", {"recompute": {"kind": "full", "layers": 2}}),
        ("qwen2-untied", {"recompute": {"kind": "full", "method": "block", "layers": 3}}),
        ("qwen2-untied", {"recompute": BOTH}),
        ("qwen3-moe", {"recompute": {"kind": "selective", "modules": ("moe",)}}),
    ],
    2: [
        ("qwen2-untied", {"parallel": {"tensor": 2}}),
        ("qwen2-untied", {"parallel": SP}),
        ("qwen3-moe", {"parallel": SP | {"expert_tensor": 1}}),
        ("qwen3-moe", {"parallel": SP}),
    ],
}


#: Elements at most: every parameter begins at a multiple of 64 in its buffer.
PADDING = 64 * 60
#: Two processes whose buffers and optimizers are looked at.
BUFFERS: list[tuple[str, dict[str, Any]]] = [
    ("qwen2-untied", {}),
    ("qwen2-untied", {"precision": "bf16"}),
    ("qwen2-tied", {"precision": "bf16", "parallel": {"pipeline": 2}}),
    ("qwen3-moe", {"precision": "bf16", "parallel": {"expert": 2}}),
    ("qwen3-moe", {"parallel": {"expert_tensor": 2}}),
    ("qwen2-untied", {"precision": "bf16", "parameters": "adapter", "adapter": {"rank": 4}}),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models."""
    folder = tmp_path_factory.mktemp("models")
    for name in {name for cases in (*CASES.values(), BUFFERS) for name, _ in cases}:
        parity.write_model(folder, name)
    return folder


@pytest.fixture(scope="module")
def two(folder: Path) -> list[tuple[list[tuple[int, int, int]], list[float]]]:
    """Of both ranks of a world what `held` and `measured` find."""
    return parity.run_world("test_plan_measured", "both", 2, str(folder))


def both(world: Any, folder: str) -> tuple[list[tuple[int, int, int]], list[float]]:
    return held(world, folder), measured(world, folder)


def held(world: Any, folder: str) -> list[tuple[int, int, int]]:
    """Bytes of weights, gradients and optimizer state on this rank, in every case of `BUFFERS`, after an update."""
    found = []
    for name, changes in BUFFERS:
        config = parity.run_config(Path(folder, name), algorithm={"name": "grpo"}, **changes)
        with parity.policy_of(config, world) as policy:
            batch = parity.mini_batch(0)
            parity.update(policy, parity.grpo(config), batch)
            buffers = [
                b
                for chunk in policy.trained["policy"].wrapped
                for b in (*chunk.buffers, *chunk.expert_parallel_buffers)
            ]
            weights = sum(buffer.param_data.nbytes for buffer in buffers)
            found.append((weights, sum(buffer.grad_data.nbytes for buffer in buffers), optimizer_bytes(policy)))
    return found


def optimizer_bytes(policy: Any) -> int:
    """Bytes of the moments, and of the fp32 copies of weights in another type, in the real optimizers."""
    total = 0
    for one in policy.trained["policy"].optimizer.chained_optimizers:
        total += sum(p.nbytes for group in one.shard_fp32_from_float16_groups for p in group)
        states = one.optimizer.state.values()
        total += sum(state[moment].nbytes for state in states for moment in ("exp_avg", "exp_avg_sq"))
    return total


def test_buffers_and_optimizer_are_those_of_a_real_policy(folder: Path, two: list[Any]) -> None:
    for (name, changes), *found in zip(BUFFERS, *(ranks[0] for ranks in two), strict=True):
        config = parity.run_config(folder / name, **changes)
        shards = shards_of(config, read_model_shape(folder / name), 2)
        in_stage = 2 // len(shards)
        for rank, (weights, gradients, optimizer) in enumerate(found):
            shard = shards[rank // in_stage]
            assert weights == memory.weights(shard.trained), (name, changes)
            assert gradients == memory.gradients(shard.trained), (name, changes)
            assert optimizer <= memory.optimizer(shard.trained), (name, changes)
        each = 12 if config.precision == "bf16" else 8
        for shard in shards:
            # Experts are each rank's own here; the rest is spread over the ranks of the stage. Padding has no state.
            experts = 0 if shard.adapter else shard.by_kind.get("experts", 0)
            state = each * ((shard.adapter or shard.parameters) - experts + in_stage * experts)
            assert sum(found[shard.stage * in_stage + rank][2] for rank in range(in_stage)) == state, (name, changes)
            assert in_stage * memory.optimizer(shard.trained) - state < each * in_stage * PADDING, (name, changes)


def measured(world: Any, folder: str) -> list[float]:
    """Saved bytes per token in every case of `CASES`, on this rank."""
    found = []
    for name, changes in CASES[world.size]:
        with parity.policy_of(parity.run_config(Path(folder, name), **changes), world, weights=False) as policy:
            for parameter in policy.chunks[0].parameters():
                parameter.data.normal_(std=0.02)
            found.append(saved_tensors.saved_bytes_per_token(policy))
    return found


def test_what_layers_save_is_the_formula_and_what_is_known_beyond(folder: Path, two: list[Any]) -> None:
    alone = parity.run_world("test_plan_measured", "measured", 1, str(folder))
    for processes, ranks in ((1, alone), (2, [saved for _, saved in two])):
        for (name, changes), *found in zip(CASES[processes], *ranks, strict=True):
            config = parity.run_config(folder / name, **changes)
            shape = read_model_shape(folder / name)
            (chunk,) = chunks_of_stage(shape.num_layers, config.parallel, 0)
            formula = chunk_activations(config, shape, chunk).kept
            assert found == [formula + beyond(config, shape)] * processes, (name, changes)
            assert formula > found[0] / 2


def beyond(config: RunConfig, shape: ModelShape) -> float:
    """Bytes per token that the CPU's layers keep beyond the formula."""
    recompute = config.recompute
    count = shape.num_layers
    if recompute.kind == "full":
        count = 0 if recompute.method == "uniform" else shape.num_layers - recompute.layers
    layers = range(shape.num_layers - count, shape.num_layers)
    # The embedding of a part of the vocabulary keeps which ids are others', and the ids without them.
    embedding = 9 if config.parallel.tensor > 1 else 0
    found = sum(beyond_layer(config, shape, layer) for layer in layers)
    return found + beyond_norm(config, shape.hidden_size) + embedding


def beyond_norm(config: RunConfig, width: int, heads: float = 1) -> float:
    """A norm that is not fused keeps its input over the root mean square, and that."""
    return FP32 * (width + heads) / (config.parallel.tensor if config.parallel.sequence else 1)


def beyond_layer(config: RunConfig, shape: ModelShape, layer: int) -> float:
    again = config.recompute.modules if config.recompute.kind == "selective" else ()
    sparse, tensor = shape.is_sparse(layer), config.parallel.tensor
    query, key = (heads * shape.head_dim / tensor for heads in (shape.num_heads, shape.num_kv_heads))
    found = beyond_norm(config, shape.hidden_size)
    if "core_attn" in again:
        # The unrotated queries, of which keys and values are no part, and a flag for the random state.
        found += FP32 * (query + 1 / saved_tensors.TOKENS)
    else:
        # Keys and values repeated for every query head, and the output in the layout of the attention.
        found += FP32 * (2 * (query - key) + query)
    if shape.qk_norm:
        # Keys before their norm are part of the fused tensor, which stays as a whole, and so are queries where there is
        # one key-value head; then what the norms keep.
        found += FP32 * (query + key - (query if shape.num_kv_heads == tensor else 0))
        found += FP32 * (query + key + (shape.num_heads + shape.num_kv_heads) / tensor)
    if sparse and "moe" in again:
        return found + beyond_norm(config, shape.hidden_size)
    if not sparse and "mlp" in again:
        return found
    found += beyond_norm(config, shape.hidden_size)
    if not sparse:
        # SiLU(gate), and up plus nothing.
        return found + FP32 * 2 * shape.ffn_size / tensor
    expert_tensor = config.parallel.expert_tensor or tensor
    copies = shape.experts_per_token * expert_tensor / (tensor if config.parallel.sequence else 1)
    # The same, and their product before the experts' weights.
    found += FP32 * 3 * shape.expert_ffn_size / expert_tensor * copies
    if shape.shared_expert_ffn_size:
        # The shared expert's, and the gate of its output.
        found += FP32 * (2 * shape.shared_expert_ffn_size / tensor + 1)
    return found
