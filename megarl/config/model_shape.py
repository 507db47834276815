"""The sizes and switches of a model, read from its Hugging Face `config.json`. Torch-free.

One record describes every supported family; the weight map and the policy are built from it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megarl.errors import Refusal


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a decoder. Lengths in elements; `rope_scaling` as Hugging Face writes it.

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

#: Rotary scalings, and the numbers that each needs.
ROPE_FACTORS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor",),
}


#: Where the configuration of a mixture of experts has its sizes.
EXPERT_SIZES: dict[str, dict[str, str]] = {
    "qwen2_moe": {
        "num_experts": "num_experts",
        "experts_per_token": "num_experts_per_tok",
        "expert_ffn_size": "moe_intermediate_size",
        "shared_expert_ffn_size": "shared_expert_intermediate_size",
    },
    "qwen3_moe": {
        "num_experts": "num_experts",
        "experts_per_token": "num_experts_per_tok",
        "expert_ffn_size": "moe_intermediate_size",
    },
    "mixtral": {
        "num_experts": "num_experts",
        "experts_per_token": "num_experts_per_tok",
        "expert_ffn_size": "intermediate_size",
    },
}


def read_model_shape(path: str | Path) -> ModelShape:
    """Read `config.json` in the directory `path`.

    Raises `Refusal` where the directory, the file, a needed size or the family is missing.
    """
    file = Path(path) / "config.json"
    if not file.is_file():
        raise Refusal(
            f"model.path={path}",
            "must be a Hugging Face checkpoint directory with a config.json",
            "give an existing directory",
        )
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise Refusal(str(file), f"must be JSON ({error})", "restore the file from the original checkpoint") from None
    if not isinstance(raw, dict):
        raise Refusal(str(file), "must be a JSON object", "restore the file from the original checkpoint")
    return model_shape_from_hf(raw, origin=str(file))


def model_shape_from_hf(raw: dict[str, Any], origin: str = "config.json") -> ModelShape:
    """Translate a Hugging Face configuration (as a dict). Raises `Refusal` like `read_model_shape`."""
    family = str(raw.get("model_type", ""))
    if family not in FAMILIES:
        raise Refusal(
            f"model_type={family!r} in {origin}",
            f"must be one of {sorted(FAMILIES)}",
            "convert to a supported architecture",
        )
    switches = FAMILIES[family]
    _check_kind(switches, family, raw, origin)
    if "num_local_experts" in raw:
        # What transformers writes since 5.0, where older files have num_experts.
        raw = {"num_experts": raw["num_local_experts"]} | raw
    sizes = ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"]
    sizes += EXPERT_SIZES.get(family, {}).values()
    missing = [key for key in sizes if key not in raw]
    if missing:
        raise Refusal(
            f"{origin} without {', '.join(missing)}", "every size must be given", "restore the original config.json"
        )
    for key in (*sizes, "num_key_value_heads", "head_dim", "max_position_embeddings", "decoder_sparse_step"):
        # A null stands for the default, but not for a size.
        if raw.get(key) is not None or key in sizes:
            _check_number(key, raw[key], int, 0 if key == "shared_expert_intermediate_size" else 1, origin)
    for key in ("rope_theta", "rms_norm_eps"):
        if raw.get(key) is not None:
            _check_number(key, raw[key], float, 0, origin)
    heads, kv_heads = raw["num_attention_heads"], raw.get("num_key_value_heads") or raw["num_attention_heads"]
    if heads % kv_heads:
        raise Refusal(
            f"num_key_value_heads={kv_heads} in {origin}",
            f"must divide the {heads} attention heads",
            "restore the original config.json",
        )
    theta, scaling = _rope(raw, origin)
    attention_bias = bool(raw.get("attention_bias", False))
    return ModelShape(
        family=family,
        hidden_size=raw["hidden_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
        ffn_size=raw["intermediate_size"],
        vocab_size=raw["vocab_size"],
        tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=switches.qkv_bias or attention_bias,
        attention_out_bias=attention_bias and family != "qwen2",
        qk_norm=switches.qk_norm,
        norm_epsilon=float(raw.get("rms_norm_eps") or 1e-6),
        rope_theta=theta,
        max_positions=int(raw.get("max_position_embeddings") or 2048),
        rope_scaling=scaling,
        eos_token_ids=_end_tokens(raw.get("eos_token_id"), origin),
        **(_experts(family, raw, origin) if family in EXPERT_SIZES else {}),
    )


def _check_kind(switches: Family, family: str, raw: dict[str, Any], origin: str) -> None:
    """Refuse what the layers of the policy are not."""
    architectures = raw.get("architectures")
    if architectures and switches.architecture not in architectures:
        raise Refusal(
            f"architectures={architectures} in {origin}",
            f"must be {switches.architecture} for model_type {family}",
            "use a causal language model",
        )
    if raw.get("auto_map"):
        raise Refusal(
            f"auto_map in {origin}",
            "names code that comes with the checkpoint, which is never run",
            f"remove it if the weights are those of a plain {family} model, or use another checkpoint",
        )
    window = _sliding_window(family, raw)
    if window is not None:
        raise Refusal(
            f"sliding_window={window} in {origin}",
            "sliding-window attention is not supported",
            "use a model without it, or lower max_position_embeddings to the window",
        )
    if raw.get("hidden_act", "silu") != "silu":
        raise Refusal(f"hidden_act={raw['hidden_act']!r} in {origin}", "must be silu", "use a SwiGLU model")
    if raw.get("mlp_bias"):
        raise Refusal(f"mlp_bias=true in {origin}", "must be false", "use a model without MLP biases")


def _check_number(key: str, value: Any, kind: type, least: int, origin: str) -> None:
    fits = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    if not fits or value < least or (kind is float and value == 0):
        what = f"a whole number of at least {least}" if kind is int else "a number above 0"
        raise Refusal(f"{key}={value!r} in {origin}", f"must be {what}", "restore the original config.json")


def _rope(raw: dict[str, Any], origin: str) -> tuple[float, dict[str, Any]]:
    """Base of the rotary embedding, and its scaling as Hugging Face writes it, empty for none."""
    found = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(found, dict) or any(isinstance(value, dict) for value in found.values()):
        raise Refusal(
            f"rope_parameters={found!r} in {origin}", "must be one scaling for all layers", "use a model with one"
        )
    rope = dict(found)
    theta = rope.pop("rope_theta", None) or raw.get("rope_theta") or 10000.0
    _check_number("rope_theta", theta, float, 0, origin)
    if (rope.pop("partial_rotary_factor", None) or raw.get("partial_rotary_factor") or 1) != 1:
        raise Refusal(f"partial_rotary_factor in {origin}", "must be 1: heads are rotated whole", "use another model")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_FACTORS:
        raise Refusal(
            f"rope_type={kind!r} in {origin}",
            f"must be {', '.join(list(ROPE_FACTORS)[:-1])} or {list(ROPE_FACTORS)[-1]}",
            "use a model with one of these",
        )
    for key in ROPE_FACTORS[kind]:
        if key not in rope:
            raise Refusal(f"{origin} without {key}", f"a {kind} scaling needs it", "restore the original config.json")
        _check_number(key, rope[key], float, 0, origin)
    return float(theta), {} if kind == "default" else rope


def _end_tokens(found: Any, origin: str) -> tuple[int, ...]:
    tokens = [] if found is None else found if isinstance(found, list) else [found]
    for token in tokens:
        _check_number("eos_token_id", token, int, 0, origin)
    return tuple(tokens)


def _sliding_window(family: str, raw: dict[str, Any]) -> int | None:
    """The tokens that attention looks back, None for all of them; with transformers' default where it is not said."""
    if family in ("mistral", "mixtral"):
        window = raw.get("sliding_window", 4096 if family == "mistral" else None)
        return window if window and window < int(raw.get("max_position_embeddings", 4096 * 32)) else None
    return raw.get("sliding_window") if raw.get("use_sliding_window") else None


def _experts(family: str, raw: dict[str, Any], origin: str) -> dict[str, Any]:
    """The fields of a mixture of experts."""
    sizes: dict[str, Any] = {ours: raw[theirs] for ours, theirs in EXPERT_SIZES[family].items()}
    if not 1 <= sizes["experts_per_token"] <= sizes["num_experts"]:
        raise Refusal(
            f"num_experts_per_tok={sizes['experts_per_token']} in {origin}",
            f"must be between 1 and the {sizes['num_experts']} experts",
            "restore the original config.json",
        )
    layers = range(raw["num_hidden_layers"])
    # As in transformers: every `decoder_sparse_step`-th layer, but for those that are named.
    step, dense = raw.get("decoder_sparse_step", 1), set(raw.get("mlp_only_layers") or ())
    sizes["sparse_layers"] = tuple(layer not in dense and (layer + 1) % step == 0 for layer in layers)
    sizes["normalize_topk"] = family == "mixtral" or bool(raw.get("norm_topk_prob", False))
    # Transformers adds the loss only where the router's logits are asked for.
    asked = bool(raw.get("output_router_logits", False))
    sizes["router_aux_loss"] = float(raw.get("router_aux_loss_coef", 0.001)) if asked else 0.0
    return sizes
