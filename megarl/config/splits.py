"""Which sizes of tensor and expert parallelism cut a model into equal shares, in the policy and in the engine.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterator

from megarl.config.model_shape import ModelShape
from megarl.config.sections import ParallelSettings
from megarl.config.wording import divisors, listed
from megarl.errors import Refusal

#: vLLM pads the vocabulary to a multiple of this (`DEFAULT_VOCAB_PADDING_SIZE`) and splits the result evenly.
VLLM_VOCABULARY_MULTIPLE = 64

#: Part of a tensor of queries (0), keys (1) and values (2): which of the three, and its rows [start, stop).
Span = tuple[int, int, int]


def vllm_vocabulary(shape: ModelShape) -> int:
    """Rows of vLLM's embedding, of all ranks together."""
    return -(-shape.vocab_size // VLLM_VOCABULARY_MULTIPLE) * VLLM_VOCABULARY_MULTIPLE


def policy_refusals(shape: ModelShape, parallel: ParallelSettings) -> Iterator[Refusal]:
    """What `parallel` cannot cut of `shape`."""
    tensor, expert = parallel.tensor, parallel.expert
    value = f"parallel.tensor={tensor}"
    yield from _dense(value, tensor, shape)
    # With fewer key-value heads than ranks Megatron cuts a group's fused rows in equal parts, and gathers them again.
    rows = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    if not shape.num_heads % tensor and rows % tensor:
        yield Refusal(
            value,
            f"must divide the {rows} fused rows of the model's queries, keys and values",
            f"use {divisors(shape.num_heads, rows)}",
        )
    if not shape.is_moe:
        if expert > 1:
            yield of_mixtures(f"parallel.expert={expert}", shape)
        if parallel.expert_tensor not in (None, 1):
            yield of_mixtures(f"parallel.expert_tensor={parallel.expert_tensor}", shape)
        return
    if shape.num_experts % expert:
        yield Refusal(
            f"parallel.expert={expert}",
            f"must divide the model's {shape.num_experts} experts",
            f"use {divisors(shape.num_experts)}",
        )
    expert_tensor = parallel.expert_tensor or tensor
    if shape.expert_ffn_size % expert_tensor:
        yield Refusal(
            f"parallel.{'expert_tensor' if parallel.expert_tensor else 'tensor'}={expert_tensor}",
            f"must divide the {shape.expert_ffn_size} rows of an expert's MLP",
            f"set parallel.expert_tensor to {divisors(shape.expert_ffn_size, shape.num_heads)}",
        )


def of_mixtures(value: str, shape: ModelShape) -> Refusal:
    """What is said of a setting of mixtures of experts beside a dense model."""
    rule = f"is for mixtures of experts, and a {shape.family} model is dense"
    return Refusal(value, rule, f"remove {value.partition('=')[0]}")


def engine_refusals(shape: ModelShape, tensor: int, expert_parallel: bool = False) -> Iterator[Refusal]:
    """What an engine of `tensor` ranks, each with its share of every weight, cannot cut of `shape`.

    With `expert_parallel` a rank has its share of the experts instead of a share of each.
    """
    value = f"rollout.tensor={tensor}"
    yield from _dense(value, tensor, shape)
    if expert_parallel:
        if not shape.is_moe:
            yield Refusal("rollout.expert_parallel=true", "needs a mixture of experts", "remove it")
        elif shape.num_experts % tensor:
            yield Refusal(
                value,
                f"must divide the model's {shape.num_experts} experts with rollout.expert_parallel",
                f"use {divisors(shape.num_heads, shape.num_experts)}",
            )
    elif shape.is_moe and shape.expert_ffn_size % tensor:
        yield Refusal(
            value,
            f"must divide the {shape.expert_ffn_size} rows of an expert's MLP",
            f"use {divisors(shape.num_heads, shape.expert_ffn_size)}",
        )
    if shape.is_moe and tensor > shape.num_experts:
        yield Refusal(value, f"must be at most the model's {shape.num_experts} experts, as vLLM wants it", "lower it")
    padded = vllm_vocabulary(shape)
    if padded % tensor:
        rule = f"must divide the model's vocabulary of {shape.vocab_size}, padded by vLLM to {padded}"
        yield Refusal(value, rule, "use a power of two")


def _dense(value: str, tensor: int, shape: ModelShape) -> Iterator[Refusal]:
    """Heads and MLPs that every token passes; policy and engine split them alike.

    Megatron-core 0.19.2 (TransformerConfig.__post_init__) and vLLM (the models' attention) both want
    key-value heads that TP divides, each rank holding some, or that divide TP, each copied to several.
    """
    if shape.num_heads % tensor:
        yield Refusal(
            value, f"must divide the model's {shape.num_heads} attention heads", f"use {divisors(shape.num_heads)}"
        )
    elif shape.num_kv_heads % tensor and tensor % shape.num_kv_heads:
        usable = [n for n in range(1, shape.num_heads + 1) if shape.num_heads % n == 0]
        usable = [n for n in usable if shape.num_kv_heads % n == 0 or n % shape.num_kv_heads == 0]
        yield Refusal(
            value,
            f"must divide the model's {shape.num_kv_heads} key-value heads or be a multiple of them",
            f"use {listed(usable)}",
        )
    elif not (shape.is_moe and all(shape.sparse_layers)) and shape.ffn_size % tensor:
        yield Refusal(
            value,
            f"must divide the model's MLP size of {shape.ffn_size}",
            f"use {divisors(shape.num_heads, shape.ffn_size)}",
        )
    elif shape.shared_expert_ffn_size % tensor:
        yield Refusal(
            value,
            f"must divide the {shape.shared_expert_ffn_size} rows of the shared expert's MLP",
            f"use {divisors(shape.num_heads, shape.shared_expert_ffn_size)}",
        )


def megatron_qkv(shape: ModelShape, shards: int, rank: int) -> list[Span]:
    """Megatron's order: for each key-value head its query heads, its key, its value; then an even cut.

    Where there are fewer key-value heads than ranks, the cut falls inside a group, possibly inside a head.
    """
    head, per_group = shape.head_dim, shape.num_heads // shape.num_kv_heads * shape.head_dim
    fused: list[Span] = []
    for group in range(shape.num_kv_heads):
        fused.append((0, group * per_group, (group + 1) * per_group))
        fused.extend((part, group * head, (group + 1) * head) for part in (1, 2))
    share = sum(stop - start for _, start, stop in fused) // shards
    low, high = rank * share, (rank + 1) * share
    spans: list[Span] = []
    offset = 0
    for part, start, stop in fused:
        first, last = max(low - offset, 0), min(high - offset, stop - start)
        if first < last:
            spans.append((part, start + first, start + last))
        offset += stop - start
    return spans


def vllm_qkv(shape: ModelShape, shards: int, rank: int) -> list[Span]:
    """vLLM's order: this rank's query heads, its key heads, its value heads.

    Where there are fewer key-value heads than ranks, consecutive ranks hold the same one.
    """
    query = shape.num_heads // shards * shape.head_dim
    key_value = max(1, shape.num_kv_heads // shards) * shape.head_dim
    place = rank // max(1, shards // shape.num_kv_heads)
    return [
        (0, rank * query, (rank + 1) * query),
        *((part, place * key_value, (place + 1) * key_value) for part in (1, 2)),
    ]
