"""What the engine takes of a GPU: weights, keys and values, and what it needs while it computes."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from megarl.config.cluster import GIB, Cluster
from megarl.config.implied import Implied
from megarl.config.model_shape import ModelShape
from megarl.config.quantisation import BLOCK
from megarl.config.schema import RunConfig
from megarl.rehearsal.report import KvCache
from megarl.reshard.wire import BYTES
from megarl.weights.push_plan import engine_tensors, push_wire

#: Tokens of a block of vLLM's cache on a GPU.
BLOCK_TOKENS = 16


def engine_weights(config: RunConfig, shape: ModelShape) -> int:
    """Bytes of the engine's parameters on one of its ranks, all of which are alike. Raises `Refusal` like
    `engine_tensors`."""
    wire = push_wire(config, shape)
    return sum(
        # What is padding alone comes from no tensor of the checkpoint.
        prod(tensor.shape) * BYTES[wire(tensor.regions[0].hf_name) if tensor.regions else config.engine_dtype]
        for tensor in engine_tensors(config, shape, 0).values()
    )


def working_bytes(config: RunConfig, shape: ModelShape) -> int:
    """What vLLM takes while it computes: the widest layer of its largest batch, and the logits of all sequences.

    Hidden states and residual; of an MLP gate, up and product, of a mixture also the tokens at their experts; of an
    engine in FP8 what is multiplied of these, once more in a byte, with a scale for 128. Logits, processed log-probs
    and probabilities in fp32. vLLM measures the real figure when it starts.
    """
    e, h, t = BYTES[config.engine_dtype], shape.hidden_size, config.rollout.tensor
    tokens = Implied(config).batched_tokens
    attention = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim / t
    dense = 0.0 if shape.is_moe and all(shape.sparse_layers) else 3 * shape.ffn_size / t
    # vLLM's two workspaces of experts, for all tokens on every rank; with expert parallelism of whole experts.
    pair = 2 * shape.expert_ffn_size / (1 if config.rollout.expert_parallel else t)
    experts = shape.experts_per_token * (max(pair, h) + max(pair / 2, h))
    widest = max(attention, dense, experts + 3 * shape.shared_expert_ffn_size / t)
    taken = tokens * e * (2 * h + widest)
    if config.rollout.precision == "fp8":
        operand = max(h, shape.num_heads * shape.head_dim / t, dense / 3, shape.experts_per_token * pair / 2)
        taken += tokens * (1 + 4 / BLOCK) * operand
    return int(taken) + 12 * config.rollout.max_concurrent * shape.vocab_size


def kv_bytes_per_token(config: RunConfig, shape: ModelShape) -> int:
    """Keys and values of all layers on one rank; heads are copied where ranks are more."""
    heads = max(1, shape.num_kv_heads // config.rollout.tensor)
    return 2 * shape.num_layers * heads * shape.head_dim * BYTES[config.engine_dtype]


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """An engine's bytes on one of its GPUs, awake: `weights`, what it takes to compute, and its cache."""

    weights: int
    working: int
    cache: KvCache


def engine_memory(config: RunConfig, shape: ModelShape, cluster: Cluster) -> EngineMemory:
    """The engine of a run. Raises `Refusal` like `engine_tensors`."""
    weights, working = engine_weights(config, shape), working_bytes(config, shape)
    size = int((config.rollout.kv_cache_gib or 0) * GIB)
    if config.rollout.kv_cache_gib is None:
        # What is left of the engine's share of the GPU.
        share = int(config.rollout.gpu_memory_fraction * cluster.gpu_memory)
        size = max(0, share - cluster.reserved - weights - working)
    return EngineMemory(weights, working, kv_cache(config, shape, size))


def kv_cache(config: RunConfig, shape: ModelShape, size: int, block: int = BLOCK_TOKENS) -> KvCache:
    """A cache of `size` bytes in blocks of `block` tokens."""
    per_token, longest = kv_bytes_per_token(config, shape), Implied(config).longest_engine_sequence
    blocks = size // (block * per_token)
    return KvCache(size, per_token, blocks * block, longest, blocks // -(-longest // block))
