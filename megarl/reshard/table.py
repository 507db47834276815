"""The weight map: one row per kind of parameter, with its names in three worlds and its layout.

The same rows drive Hugging Face -> Megatron, Megatron -> Hugging Face and Megatron -> vLLM. A family
adds nothing but data: its list of rows, and switches of `ModelShape` that say which of them exist.

Megatron's names are those of a GPT model with Transformer Engine's layer spec (the norm fused into
the linear layer after it), of experts with its grouped ones. vLLM's are those of its classes for each family.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megarl.config.model_shape import ModelShape
from megarl.errors import Refusal

#: How the parts of a row are laid out over the tensor-parallel ranks:
#: row         dimension 1 is split evenly
#: qkv         query, key and value heads, fused; the order differs between Megatron and vLLM
#: gate_up     on each rank its share of gate, then its share of up
#: vocabulary  dimension 0, padded with zero rows, is split evenly
#: replicated  every rank holds all of it
Layout = Literal["row", "qkv", "gate_up", "vocabulary", "replicated"]

#: Names of lengths, see `axis_sizes`.
Axis = Literal[
    "hidden", "query", "key_value", "head", "ffn", "vocabulary", "experts", "expert_ffn", "shared_ffn", "one"
]

#: Which layers have a row: all, those with a dense MLP, or those with a mixture of experts.
Mlp = Literal["any", "dense", "sparse"]

#: The pipeline stage that holds the row: the first, the last, or the one with the layer.
Stage = Literal["first", "layer", "last"]

Parts = tuple[tuple[str, tuple[Axis, ...]], ...]


@dataclass(frozen=True, slots=True)
class Row:
    """One kind of parameter.

    `parts`: its checkpoint tensors (name and axes) in the order they are fused. `{layer}` in a name
    stands for the layer's number: over the whole model for Hugging Face and vLLM, within the
    pipeline stage for Megatron. `vllm` is None where the engine has no such parameter. `when`: the
    `ModelShape` switch and the value it must have for the row to exist. `pipelined`: the row exists
    only with more than one pipeline stage. `mlp`: the layers that have it. `experts`: there is one such parameter for
    each expert, `{expert}` in names: its number over the whole model for Hugging Face, among the experts of the rank
    for Megatron; vLLM has one parameter for all, stacked along a leading dimension.
    """

    layout: Layout
    parts: Parts
    megatron: str
    vllm: str | None
    stage: Stage = "layer"
    when: tuple[str, bool] | None = None
    pipelined: bool = False
    mlp: Mlp = "any"
    experts: bool = False

    def is_in(self, layer: int, shape: ModelShape) -> bool:
        """Whether a layer of the whole model has this row; rows outside the layers are in none of them."""
        return self.mlp == "any" or (self.mlp == "sparse") == shape.is_sparse(layer)


def _layer(
    layout: Layout,
    parts: dict[str, tuple[Axis, ...]],
    megatron: str,
    vllm: str | None,
    when: str | None = None,
    mlp: Mlp = "any",
    experts: bool = False,
) -> Row:
    """A row of a decoder layer, names given without the layer's prefix."""
    return Row(
        layout,
        tuple((f"model.layers.{{layer}}.{name}", axes) for name, axes in parts.items()),
        f"decoder.layers.{{layer}}.{megatron}",
        None if vllm is None else f"model.layers.{{layer}}.{vllm}",
        when=None if when is None else (when, True),
        mlp=mlp,
        experts=experts,
    )


_EMBEDDING: Parts = (("model.embed_tokens.weight", ("vocabulary", "hidden")),)

_FIRST = (Row("vocabulary", _EMBEDDING, "embedding.word_embeddings.weight", "model.embed_tokens.weight", "first"),)

_LAST = (
    Row(
        "replicated",
        (("model.norm.weight", ("hidden",)),),
        "decoder.final_layernorm.weight",
        "model.norm.weight",
        "last",
    ),
    Row(
        "vocabulary",
        (("lm_head.weight", ("vocabulary", "hidden")),),
        "output_layer.weight",
        "lm_head.weight",
        "last",
        when=("tied_embeddings", False),
    ),
    # With tied embeddings the last of several stages keeps a copy of the embedding as its output
    # layer; a single stage, like vLLM, has one parameter for both.
    Row("vocabulary", _EMBEDDING, "output_layer.weight", None, "last", when=("tied_embeddings", True), pipelined=True),
)

_ATTENTION = (
    _layer(
        "replicated",
        {"input_layernorm.weight": ("hidden",)},
        "self_attention.linear_qkv.layer_norm_weight",
        "input_layernorm.weight",
    ),
    _layer(
        "qkv",
        {
            "self_attn.q_proj.weight": ("query", "hidden"),
            "self_attn.k_proj.weight": ("key_value", "hidden"),
            "self_attn.v_proj.weight": ("key_value", "hidden"),
        },
        "self_attention.linear_qkv.weight",
        "self_attn.qkv_proj.weight",
    ),
    _layer(
        "qkv",
        {
            "self_attn.q_proj.bias": ("query",),
            "self_attn.k_proj.bias": ("key_value",),
            "self_attn.v_proj.bias": ("key_value",),
        },
        "self_attention.linear_qkv.bias",
        "self_attn.qkv_proj.bias",
        when="qkv_bias",
    ),
    _layer(
        "replicated",
        {"self_attn.q_norm.weight": ("head",)},
        "self_attention.q_layernorm.weight",
        "self_attn.q_norm.weight",
        when="qk_norm",
    ),
    _layer(
        "replicated",
        {"self_attn.k_norm.weight": ("head",)},
        "self_attention.k_layernorm.weight",
        "self_attn.k_norm.weight",
        when="qk_norm",
    ),
    _layer(
        "row",
        {"self_attn.o_proj.weight": ("hidden", "query")},
        "self_attention.linear_proj.weight",
        "self_attn.o_proj.weight",
    ),
)


def _output_bias(vllm: str | None) -> Row:
    return _layer(
        "replicated",
        {"self_attn.o_proj.bias": ("hidden",)},
        "self_attention.linear_proj.bias",
        vllm,
        when="attention_out_bias",
    )


_DENSE_MLP = (
    _layer(
        "replicated",
        {"post_attention_layernorm.weight": ("hidden",)},
        "mlp.linear_fc1.layer_norm_weight",
        "post_attention_layernorm.weight",
        mlp="dense",
    ),
    _layer(
        "gate_up",
        {"mlp.gate_proj.weight": ("ffn", "hidden"), "mlp.up_proj.weight": ("ffn", "hidden")},
        "mlp.linear_fc1.weight",
        "mlp.gate_up_proj.weight",
        mlp="dense",
    ),
    _layer(
        "row",
        {"mlp.down_proj.weight": ("hidden", "ffn")},
        "mlp.linear_fc2.weight",
        "mlp.down_proj.weight",
        mlp="dense",
    ),
)


def _experts(block: str, gate: str, up: str, down: str) -> tuple[Row, ...]:
    """Norm, router and experts of a mixture; `block` and the projections are the checkpoint's names."""
    expert = f"{block}.experts.{{expert}}"
    return (
        _layer(
            "replicated",
            {"post_attention_layernorm.weight": ("hidden",)},
            "pre_mlp_layernorm.weight",
            "post_attention_layernorm.weight",
            mlp="sparse",
        ),
        _layer(
            "replicated",
            {f"{block}.gate.weight": ("experts", "hidden")},
            "mlp.router.weight",
            f"{block}.gate.weight",
            mlp="sparse",
        ),
        _layer(
            "gate_up",
            {f"{expert}.{gate}.weight": ("expert_ffn", "hidden"), f"{expert}.{up}.weight": ("expert_ffn", "hidden")},
            "mlp.experts.linear_fc1.weight{expert}",
            f"{block}.experts.routed_experts.w13_weight",
            mlp="sparse",
            experts=True,
        ),
        _layer(
            "row",
            {f"{expert}.{down}.weight": ("hidden", "expert_ffn")},
            "mlp.experts.linear_fc2.weight{expert}",
            f"{block}.experts.routed_experts.w2_weight",
            mlp="sparse",
            experts=True,
        ),
    )


_QWEN_EXPERTS = _experts("mlp", "gate_proj", "up_proj", "down_proj")

_SHARED_EXPERT = (
    _layer(
        "gate_up",
        {
            "mlp.shared_expert.gate_proj.weight": ("shared_ffn", "hidden"),
            "mlp.shared_expert.up_proj.weight": ("shared_ffn", "hidden"),
        },
        "mlp.shared_experts.linear_fc1.weight",
        "mlp.shared_expert.gate_up_proj.weight",
        mlp="sparse",
    ),
    _layer(
        "row",
        {"mlp.shared_expert.down_proj.weight": ("hidden", "shared_ffn")},
        "mlp.shared_experts.linear_fc2.weight",
        "mlp.shared_expert.down_proj.weight",
        mlp="sparse",
    ),
    _layer(
        "replicated",
        {"mlp.shared_expert_gate.weight": ("one", "hidden")},
        "mlp.shared_experts.gate_weight",
        "mlp.shared_expert_gate.weight",
        mlp="sparse",
    ),
)

#: The rows of each family, in the order of the forward pass.
ROWS: dict[str, tuple[Row, ...]] = {
    "llama": (*_FIRST, *_ATTENTION, _output_bias("self_attn.o_proj.bias"), *_DENSE_MLP, *_LAST),
    "mistral": (*_FIRST, *_ATTENTION, *_DENSE_MLP, *_LAST),
    "qwen2": (*_FIRST, *_ATTENTION, *_DENSE_MLP, *_LAST),
    # vLLM's Qwen3 class builds its output projection without a bias, whatever the checkpoint has.
    "qwen3": (*_FIRST, *_ATTENTION, _output_bias(None), *_DENSE_MLP, *_LAST),
    "qwen2_moe": (*_FIRST, *_ATTENTION, *_DENSE_MLP, *_QWEN_EXPERTS, *_SHARED_EXPERT, *_LAST),
    "qwen3_moe": (*_FIRST, *_ATTENTION, _output_bias(None), *_DENSE_MLP, *_QWEN_EXPERTS, *_LAST),
    "mixtral": (*_FIRST, *_ATTENTION, *_experts("block_sparse_moe", "w1", "w3", "w2"), *_LAST),
}


def rows_of(shape: ModelShape, pipelined: bool) -> tuple[Row, ...]:
    """The rows this model has, in the order of the forward pass.

    Raises `Refusal` for a family without a table.
    """
    if shape.family not in ROWS:
        raise Refusal(f"model family {shape.family!r}", f"must be one of {sorted(ROWS)}", "use one of these")
    return tuple(
        row
        for row in ROWS[shape.family]
        if (row.when is None or getattr(shape, row.when[0]) == row.when[1]) and (pipelined or not row.pipelined)
    )


def axis_sizes(shape: ModelShape) -> dict[str, int]:
    """The length of every axis a row can name, in elements."""
    return {
        "hidden": shape.hidden_size,
        "query": shape.num_heads * shape.head_dim,
        "key_value": shape.num_kv_heads * shape.head_dim,
        "head": shape.head_dim,
        "ffn": shape.ffn_size,
        "vocabulary": shape.vocab_size,
        "experts": shape.num_experts,
        "expert_ffn": shape.expert_ffn_size,
        "shared_ffn": shape.shared_expert_ffn_size,
        "one": 1,
    }
