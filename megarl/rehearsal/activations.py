"""What a layer keeps for its backward pass, term by term, in bytes per token.

After Korthikanti et al. 2022 (arXiv 2205.05198), sections 4 and 5, for the layers that megarl builds on a GPU: gated
MLPs, grouped key-value heads, RMSNorm, no dropout, no biases outside of attention, and attention that keeps no scores
(FlashAttention, arXiv 2205.14135). Transformer Engine's layers keep the input of a norm and its output, which is the
input of the linear layer after it. Of an input that is multiplied in FP8 they keep the FP8 copy that the weight's
gradient needs. Notation as there: h hidden size, t tensor parallelism, e bytes of an element; s is t with sequence
parallelism, else 1; i bytes of an element of what is multiplied. A token is one of a micro-batch on one
context-parallel rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megarl.config.fp8 import BLOCKWISE, layers_in_fp8
from megarl.config.grid import Chunk
from megarl.config.model_shape import ModelShape
from megarl.config.quantisation import BLOCK
from megarl.config.schema import RunConfig
from megarl.config.sections import RecomputeSettings
from megarl.reshard.wire import BYTES

#: Tokens of the busiest of several expert-parallel ranks / the mean. Our assumption: no token is ever dropped, and what
#: routers choose is not known before they are trained.
EXPERT_LOAD = 1.5


@dataclass(frozen=True, slots=True)
class Term:
    """One tensor that a layer keeps: bytes per token, and the selective recomputations that make it anew instead."""

    what: str
    bytes: float
    dropped_by: frozenset[str] = frozenset()
    mlp: bool = False
    made: bool = False
    """Whether it is what a linear layer gives."""


def layer_terms(config: RunConfig, shape: ModelShape, *, sparse: bool, fp8: bool = False) -> tuple[Term, ...]:
    """All that one layer keeps without recomputation; `sparse`: one with a mixture of experts; `fp8`: one whose linear
    layers multiply in FP8."""
    i = operand_bytes(config) if fp8 else BYTES[config.params_dtype]
    mlp = _experts(config, shape, i) if sparse else _dense_mlp(config, shape, i)
    return (*_attention(config, shape, i, fp8), *mlp)


def operand_bytes(config: RunConfig) -> float:
    """Bytes of an element of an input in FP8: with blockwise scaling its part of the scale of 128 tokens."""
    return 1 + 4 / BLOCK if config.precision == BLOCKWISE else 1


def _attention(config: RunConfig, shape: ModelShape, i: float, fp8: bool) -> Iterator[Term]:
    e, h = BYTES[config.params_dtype], shape.hidden_size
    t, s = config.parallel.tensor, _sequence_parallel(config)
    query = shape.num_heads * shape.head_dim / t
    # Where ranks are more than key-value heads, each attends with a whole one.
    key_value = max(1.0, shape.num_kv_heads / t) * shape.head_dim
    yield Term("the layer's input", e * h / s)
    yield Term("its norm, input of queries, keys and values", i * h / s)
    yield Term("queries, keys and values, rotated", e * (query + 2 * key_value))
    if shape.qk_norm:
        yield Term("queries and keys before their norms", e * (query + key_value))
    yield Term("attention's output, input of its projection", e * query)
    if fp8:
        # Attention's backward pass needs its output as it was.
        yield Term("the same in FP8", i * query)
    yield Term("attention's log-sum-exp, fp32", 4 * shape.num_heads / t, frozenset({"core_attn"}))
    yield Term("sum with the residual, input of the MLP's norm", e * h / s)


def _dense_mlp(config: RunConfig, shape: ModelShape, i: float) -> Iterator[Term]:
    e, h, ffn = BYTES[config.params_dtype], shape.hidden_size, shape.ffn_size / config.parallel.tensor
    again = frozenset({"mlp"})
    yield Term("the MLP's norm, input of gate and up", i * h / _sequence_parallel(config), again, mlp=True)
    yield Term("gate and up", e * 2 * ffn, again, mlp=True, made=True)
    yield Term("SiLU(gate) x up, input of down", i * ffn, again, mlp=True)


def _experts(config: RunConfig, shape: ModelShape, i: float) -> Iterator[Term]:
    e, h, k = BYTES[config.params_dtype], shape.hidden_size, shape.experts_per_token
    t, s = config.parallel.tensor, _sequence_parallel(config)
    expert_tensor = config.parallel.expert_tensor or t
    # Copies of tokens that arrive at a rank, per token: each goes to k experts, and to all ranks that share an expert.
    copies = (EXPERT_LOAD if config.parallel.expert > 1 else 1) * k * expert_tensor / s
    ffn = shape.expert_ffn_size / expert_tensor
    again = frozenset({"moe"})
    router = {"fp32": 4, "fp64": 8}[config.moe.router_dtype]
    yield Term("the mixture's norm", e * h / s, frozenset({"layernorm"}), mlp=True)
    # The softmax over the chosen experts, or over all; three indices of each chosen one; a weight for all.
    softmax = k if shape.normalize_topk else shape.num_experts
    routing = router * softmax + 24 * k + router * shape.num_experts
    yield Term("the router's softmax and choices", routing / s, again)
    yield Term("tokens at their experts, input of gate and up", i * h * copies, again, mlp=True)
    yield Term("gate and up of the experts", e * 2 * ffn * copies, again, mlp=True, made=True)
    yield Term("SiLU(gate) x up of the experts", i * ffn * copies, again | {"moe_act"}, mlp=True)
    yield Term("weights of the experts, fp32", 4 * copies, again)
    if shape.shared_expert_ffn_size:
        shared, kept = shape.shared_expert_ffn_size / t, again | {"shared_experts"}
        yield Term("gate and up of the shared expert", e * 2 * shared, kept, mlp=True, made=True)
        yield Term("SiLU(gate) x up of the shared expert", i * shared, kept, mlp=True)
        yield Term("its output, times its gate", e * h / s, again, mlp=True)


@dataclass(frozen=True, slots=True)
class ChunkActivations:
    """Bytes per token of one pass through a model chunk.

    `kept` until the backward pass; `again`: the most that is made anew at a time in the backward pass; `moving`: the
    most that the gradients of one layer take.
    """

    kept: float
    again: float
    moving: float


def chunk_activations(config: RunConfig, shape: ModelShape, chunk: Chunk) -> ChunkActivations:
    """A chunk under the run's recomputation; `chunk` has a layer."""
    e, h, s = BYTES[config.params_dtype], shape.hidden_size, _sequence_parallel(config)
    kept, again = _under(config.recompute, _terms_of(config, shape, chunk))
    # The input of the final norm, or what a chunk before the last has sent on.
    kept += e * h / s
    # The gradient of an MLP's tensors, whatever these are kept in, and of its input on all ranks before they share it
    # out; where it is multiplied in FP8, what gate and up have twice in it, for two products.
    moving = 0.0
    for sparse in {shape.is_sparse(layer) for layer in chunk.layers}:
        terms = layer_terms(config, shape, sparse=sparse)
        copies = 2 * operand_bytes(config) / e if config.uses_fp8 else 0
        gradients = sum(term.bytes * (1 + copies * term.made) for term in terms if term.mlp)
        moving = max(moving, gradients + e * h)
    return ChunkActivations(kept, again, moving)


def _terms_of(config: RunConfig, shape: ModelShape, chunk: Chunk) -> list[tuple[Term, ...]]:
    """What each layer of a chunk keeps without recomputation."""
    fp8_layers = layers_in_fp8(config.fp8, shape.num_layers) if config.uses_fp8 else ()
    return [
        layer_terms(config, shape, sparse=shape.is_sparse(layer), fp8=layer in fp8_layers) for layer in chunk.layers
    ]


def _under(recompute: RecomputeSettings, layers: list[tuple[Term, ...]]) -> tuple[float, float]:
    """Bytes per token that layers keep, and the most that a backward pass makes anew at a time."""
    whole = [sum(term.bytes for term in layer) for layer in layers]
    inputs = [layer[0].bytes for layer in layers]
    if recompute.kind == "none":
        return sum(whole), 0.0
    if recompute.kind == "selective":
        modules = frozenset(recompute.modules)
        dropped = [sum(term.bytes for term in layer if term.dropped_by & modules) for layer in layers]
        return sum(whole) - sum(dropped), max(dropped)
    count = recompute.layers
    if recompute.method == "uniform":
        groups = [slice(start, start + count) for start in range(0, len(layers), count)]
        return sum(inputs[group.start] for group in groups), max(sum(whole[group]) for group in groups)
    return sum(inputs[:count]) + sum(whole[count:]), max(whole[:count])


def forward_bytes(config: RunConfig, shape: ModelShape, chunk: Chunk) -> float:
    """Bytes per token of a pass without a gradient: at most what one layer would keep, and its input once more."""
    e, layers = BYTES[config.params_dtype], _terms_of(config, shape, chunk)
    return max(sum(term.bytes for term in layer) for layer in layers) + e * shape.hidden_size


def head_bytes(config: RunConfig, shape: ModelShape, tokens: int, *, backward: bool, entropy_gradient: bool) -> int:
    """What turns `tokens` hidden states into log-probs (`megarl.parallel.vocab`) takes at its peak.

    Three tensors in fp32 of one chunk of logits, backward the last of them in the weight's type besides; two more with
    the entropy's gradient. Beside them the hidden states on every rank and the rows of them that predict; backward the
    rows, their gradient, and that of the weight: added up in fp32, in the end in the weight's type besides; then, the
    logits gone, the gradient of the hidden states.
    """
    e, h = BYTES[config.params_dtype], shape.hidden_size
    rows = -(-shape.vocab_size // config.parallel.tensor)
    logits = min(config.batch.logprob_chunk, tokens) * rows
    if not backward:
        return 12 * logits + tokens * 2 * e * h
    narrow = e if e < 4 else 0
    within = (20 if entropy_gradient else 12 + narrow) * logits
    weight = rows * h
    return max(within + 4 * weight, (4 + narrow) * weight, e * (tokens * h + weight)) + tokens * 2 * e * h


def _sequence_parallel(config: RunConfig) -> int:
    return config.parallel.tensor if config.parallel.sequence else 1
