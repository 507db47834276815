"""What a rehearsal says of the engine, against tiny engines of vLLM: bytes of weights, and blocks of the cache."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import parity

from megarl.config.cluster import GIB
from megarl.config.implied import Implied
from megarl.config.model_shape import read_model_shape
from megarl.config.schema import RunConfig
from megarl.rehearsal.engine import engine_weights, kv_cache

#: vLLM's kernels for the CPU want heads of 32; one key-value head is on both ranks.
SIZES = {"head_dim": 32, "hidden_size": 128, "num_key_value_heads": 1, "num_hidden_layers": 3}
#: The mixture first: vLLM forms its groups for the first engine of a process.
MODELS = ("qwen3-moe", "llama-llama3")
CACHE_GIB = 0.01
#: An engine that is collected takes the process's groups down with it.
_alive: list[Any] = []


def run_of(path: Path) -> RunConfig:
    lengths = {"tokens_per_microbatch": 256}
    rollout = {"tensor": 2, "kv_cache_gib": CACHE_GIB, "max_tokens": 100}
    data = {"path": "unused", "max_prompt_tokens": 60}
    return parity.run_config(path, precision="bf16", rollout=rollout, data=data, batch=lengths)


def engines(world: Any, folder: str) -> list[tuple[int, int, int, int]]:
    """Bytes of weights, blocks, tokens of a block and longest sequence of this rank's engine, for each model."""
    from megarl.rollout.engine import Engine
    from megarl.rollout.weights import EngineWeights

    found = []
    for name in MODELS:
        path = Path(folder, name)
        engine = Engine(run_of(path), read_model_shape(path), eos_token_ids=[1], rank=world.rank, world_size=world.size)
        _alive.append(engine)
        slots = EngineWeights(engine).tensors().values()
        weights = sum(prod(slot.shape) * slot.dtype.itemsize for slot in slots)
        settings = engine._engine.vllm_config
        cache = settings.cache_config
        found.append((weights, cache.num_gpu_blocks, cache.block_size, settings.model_config.max_model_len))
    return found


def test_weights_and_cache_are_those_of_real_engines(tmp_path: Path) -> None:
    for name in MODELS:
        parity.write_model(tmp_path, name, **SIZES)
    first, second = parity.run_world("test_plan_engine", "engines", 2, str(tmp_path))
    assert first == second
    for name, (weights, blocks, block, longest) in zip(MODELS, first, strict=True):
        config, shape = run_of(tmp_path / name), read_model_shape(tmp_path / name)
        assert engine_weights(config, shape) == weights, name
        assert Implied(config).longest_engine_sequence == longest
        cache = kv_cache(config, shape, int(CACHE_GIB * GIB), block=block)
        assert cache.tokens == blocks * block, name
        assert cache.sequences == blocks // -(-longest // block)
