"""The sizes and switches of a model, read from its Hugging Face `config.json`. Torch-free.

One record describes every supported family; the weight map and the policy are built from it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megarl.config.model_folder import read_config, read_generation
from megarl.config.model_keys import KEYS, Key
from megarl.config.model_reading import RESTORE, check_value, positions_of, read_keys, shown
from megarl.config.model_rope import read_rope
from megarl.errors import Refusal


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a decoder. Lengths in elements; `rope_scaling` with all that transformers' formula needs, but the base.

    `eos_token_ids` are those that config.json and generation_config.json name; the tokenizer has one more.
    `ffn_size` is that of dense MLPs. `sparse_layers` says for each layer whether it is a mixture of experts, with
    `num_experts` MLPs of `expert_ffn_size`, of which a token goes through `experts_per_token`; empty for a dense model.
    Their weights are the router's softmax over all experts, made to add up to 1 where `normalize_topk`. A shared
    expert of `shared_expert_ffn_size`, 0 for none, is for all tokens, times a gate. `router_aux_loss` is the
    coefficient of the load-balancing loss that the checkpoint's own configuration trains with, 0 for none.
    """

    family: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    tied_embeddings: bool
    qkv_bias: bool
    attention_out_bias: bool
    qk_norm: bool
    norm_epsilon: float
    rope_theta: float
    max_positions: int
    rope_scaling: dict[str, Any] = field(default_factory=dict)
    eos_token_ids: tuple[int, ...] = ()
    sparse_layers: tuple[bool, ...] = ()
    num_experts: int = 0
    experts_per_token: int = 0
    expert_ffn_size: int = 0
    shared_expert_ffn_size: int = 0
    normalize_topk: bool = True
    router_aux_loss: float = 0.0

    @property
    def is_moe(self) -> bool:
        """Whether any layer is a mixture of experts."""
        return any(self.sparse_layers)

    def is_sparse(self, layer: int) -> bool:
        """Whether layer `layer` of the whole model is a mixture of experts."""
        return bool(self.sparse_layers) and self.sparse_layers[layer]


@dataclass(frozen=True, slots=True)
class Family:
    """What a `model_type` adds to the common llama shape, and the class that transformers and vLLM have for it."""

    architecture: str
    qkv_bias: bool = False
    qk_norm: bool = False


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family("MistralForCausalLM"),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True),
    "qwen3": Family("Qwen3ForCausalLM", qk_norm=True),
    "qwen2_moe": Family("Qwen2MoeForCausalLM", qkv_bias=True),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", qk_norm=True),
    "mixtral": Family("MixtralForCausalLM"),
}


#: By family with mixtures of experts: the key of the number of experts, and that of an expert's size.
EXPERT_KEYS: dict[str, tuple[str, str]] = {
    "qwen2_moe": ("num_experts", "moe_intermediate_size"),
    "qwen3_moe": ("num_experts", "moe_intermediate_size"),
    "mixtral": ("num_local_experts", "intermediate_size"),
}


def read_model_shape(path: str | Path) -> ModelShape:
    """Read `config.json` and `generation_config.json` in the directory `path`.

    Raises `Refusal` where the directory or a file cannot be read, and for what `model_shape_from_hf` refuses.
    """
    folder = Path(path)
    return model_shape_from_hf(
        read_config(folder),
        origin=str(folder / "config.json"),
        generation=read_generation(folder),
        generation_origin=str(folder / "generation_config.json"),
    )


def model_shape_from_hf(
    raw: dict[str, Any],
    origin: str = "config.json",
    *,
    generation: dict[str, Any] | None = None,
    generation_origin: str = "generation_config.json",
) -> ModelShape:
    """Translate a Hugging Face configuration (as a dict), and that of generation, None where there is none.

    Raises `Refusal` where the family is not supported, where a key says what the policy is not or is unknown, where
    keys contradict each other, and where a needed size is missing or out of range.
    """
    family = raw.get("model_type", "")
    if not isinstance(family, str) or family not in FAMILIES:
        raise Refusal(
            f"model_type={shown(family)} in {origin}",
            f"must be one of {sorted(FAMILIES)}",
            "convert to a supported architecture",
        )
    switches = FAMILIES[family]
    _check_architecture(switches, family, raw, origin)
    keys = read_keys(raw, family, origin)
    positions = positions_of(raw, keys, origin)
    _check_layers(family, raw, keys, origin)
    rope = read_rope(raw, family, keys["max_position_embeddings"], origin)
    attention_bias = keys.get("attention_bias", False)
    heads, kv_heads, head_dim = _heads(family, raw, keys, origin, scaled=bool(rope.scaling))
    return ModelShape(
        family=family,
        hidden_size=keys["hidden_size"],
        num_layers=keys["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        ffn_size=keys["intermediate_size"],
        vocab_size=keys["vocab_size"],
        tied_embeddings=keys["tie_word_embeddings"],
        qkv_bias=switches.qkv_bias or attention_bias,
        attention_out_bias=attention_bias,
        qk_norm=switches.qk_norm,
        norm_epsilon=keys["rms_norm_eps"],
        rope_theta=rope.theta,
        max_positions=positions if rope.reach is None else min(positions, rope.reach),
        rope_scaling=rope.scaling,
        eos_token_ids=_end_tokens(raw, keys, origin, generation, generation_origin),
        **(_experts(family, keys, origin) if family in EXPERT_KEYS else {}),
    )


def _check_architecture(switches: Family, family: str, raw: dict[str, Any], origin: str) -> None:
    architectures = raw.get("architectures")
    if architectures and architectures != [switches.architecture]:
        raise Refusal(
            f"architectures={shown(architectures)} in {origin}",
            f"must be {switches.architecture} for model_type {family}",
            "use a causal language model",
        )


def _check_layers(family: str, raw: dict[str, Any], keys: dict[str, Any], origin: str) -> None:
    """Refuse layers that are not the policy's."""
    if keys["hidden_act"] != "silu":
        raise Refusal(f"hidden_act={shown(keys['hidden_act'])} in {origin}", "must be silu", "use a SwiGLU model")
    if keys.get("mlp_bias"):
        raise Refusal(f"mlp_bias=true in {origin}", "must be false", "use a model without MLP biases")
    if not keys.get("qkv_bias", True):
        raise Refusal(f"qkv_bias=false in {origin}", "must be true", f"use a {family} model with these biases")
    if keys["is_encoder_decoder"]:
        raise Refusal(f"is_encoder_decoder=true in {origin}", "must be false", "use a causal language model")
    # Where there is a switch, transformers and vLLM pass over the window without it.
    window = raw.get("sliding_window", KEYS[family].get("sliding_window", Key(None, "token")).default)
    check_value("sliding_window", window, Key(None, "token", null=True), origin)
    if keys.get("use_sliding_window", True) and window is not None and window < keys["max_position_embeddings"]:
        raise Refusal(
            f"sliding_window={window} in {origin}",
            "sliding-window attention is not supported",
            "use a model without it, or lower max_position_embeddings to the window",
        )
    types = raw.get("layer_types")
    check_value("layer_types", types, Key(None, "names", null=True), origin)
    if types is not None and types != ["full_attention"] * keys["num_hidden_layers"]:
        raise Refusal(
            f"layer_types={shown(types)} in {origin}",
            f"must be full_attention, for each of the {keys['num_hidden_layers']} layers",
            "use a model whose layers all attend to all tokens",
        )


def _heads(
    family: str, raw: dict[str, Any], keys: dict[str, Any], origin: str, *, scaled: bool
) -> tuple[int, int, int]:
    """Attention heads, key-value heads, and elements of a head."""
    hidden, heads = keys["hidden_size"], keys["num_attention_heads"]
    kv_heads = keys["num_key_value_heads"] or heads
    if heads % kv_heads:
        said = f"num_key_value_heads={kv_heads}"
        if "num_key_value_heads" not in raw:
            said += f" ({family}'s default)"
        raise Refusal(f"{said} in {origin}", f"must divide the {heads} attention heads", RESTORE)
    if family == "llama" and hidden % heads:
        raise Refusal(f"hidden_size={hidden} in {origin}", f"must be a multiple of the {heads} heads", RESTORE)
    head_dim = keys.get("head_dim") or hidden // heads
    if "head_dim" in raw and "head_dim" not in KEYS[family]:
        # No field of the class, and yet its layers go by it; the engine's do for qwen3_moe alone.
        check_value("head_dim", raw["head_dim"], Key(None, "whole"), origin)
        if family != "qwen3_moe" and raw["head_dim"] != head_dim:
            raise Refusal(
                f"head_dim={raw['head_dim']} in {origin}",
                f"must be hidden_size / num_attention_heads = {head_dim}, as the engine has it for {family}",
                "remove it, or use a model of another family",
            )
        head_dim = raw["head_dim"]
    # Where transformers' class has the size of a head, or a scaling needs it, it is checked there too.
    checked = scaled or family in ("llama", "mistral") or raw.get("head_dim") is not None
    if head_dim < 1 or (head_dim % 2 and checked):
        raise Refusal(
            f"heads of {head_dim} elements in {origin}", "must have an even number, to be rotated in pairs", RESTORE
        )
    return heads, kv_heads, head_dim


def _end_tokens(
    raw: dict[str, Any], keys: dict[str, Any], origin: str, generation: dict[str, Any] | None, generation_origin: str
) -> tuple[int, ...]:
    """What ends an answer, by both files. vLLM stops at all that it finds there, whatever it is told."""
    stated = [(keys["eos_token_id"], origin)]
    if generation is not None:
        check_value("eos_token_id", generation.get("eos_token_id"), Key(None, "tokens", null=True), generation_origin)
        # Defaults of a family's class are for checkpoints without this file.
        stated = [(raw.get("eos_token_id"), origin), (generation.get("eos_token_id"), generation_origin)]
    found: dict[int, None] = {}
    for tokens, file in stated:
        for token in [] if tokens is None else tokens if isinstance(tokens, list) else [tokens]:
            if token < keys["vocab_size"]:
                found[token] = None
            elif "eos_token_id" in raw or generation is not None:
                raise Refusal(
                    f"eos_token_id={shown(token)} in {file}",
                    f"must be below vocab_size={keys['vocab_size']}: such a token never comes",
                    "correct the end token, or restore the original files",
                )
    return tuple(found)


def _experts(family: str, keys: dict[str, Any], origin: str) -> dict[str, Any]:
    """The fields of a mixture of experts."""
    number, size = EXPERT_KEYS[family]
    experts, chosen = keys[number], keys["num_experts_per_tok"]
    if chosen > experts:
        raise Refusal(
            f"num_experts_per_tok={chosen} in {origin}", f"must be between 1 and the {experts} experts", RESTORE
        )
    # As in transformers: every `decoder_sparse_step`-th layer, but for those that are named.
    step, dense = keys.get("decoder_sparse_step", 1), set(keys.get("mlp_only_layers") or ())
    return {
        "num_experts": experts,
        "experts_per_token": chosen,
        "expert_ffn_size": keys[size],
        "shared_expert_ffn_size": keys.get("shared_expert_intermediate_size", 0),
        "sparse_layers": tuple(
            layer not in dense and (layer + 1) % step == 0 for layer in range(keys["num_hidden_layers"])
        ),
        "normalize_topk": keys.get("norm_topk_prob", True),
        # Transformers adds the loss only where the router's logits are asked for.
        "router_aux_loss": keys["router_aux_loss_coef"] if keys["output_router_logits"] else 0.0,
    }
