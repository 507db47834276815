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


#: What a family adds to the common llama shape.
FAMILIES: dict[str, dict[str, bool]] = {
    "llama": {"qkv_bias": False, "qk_norm": False},
    "mistral": {"qkv_bias": False, "qk_norm": False},
    "qwen2": {"qkv_bias": True, "qk_norm": False},
    "qwen3": {"qkv_bias": False, "qk_norm": True},
    "qwen2_moe": {"qkv_bias": True, "qk_norm": False},
    "qwen3_moe": {"qkv_bias": False, "qk_norm": True},
    "mixtral": {"qkv_bias": False, "qk_norm": False},
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
        raw: dict[str, Any] = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise Refusal(str(file), f"must be JSON ({error})", "restore the file from the original checkpoint") from None
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
    needed = ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"]
    if "num_local_experts" in raw:
        # What transformers writes since 5.0, where older files have num_experts.
        raw = {"num_experts": raw["num_local_experts"]} | raw
    needed += EXPERT_SIZES.get(family, {}).values()
    missing = [key for key in needed if not isinstance(raw.get(key), int)]
    if missing:
        raise Refusal(
            f"{origin} without {', '.join(missing)}",
            "every size must be given as an integer",
            "restore the original config.json",
        )
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    theta = float(rope.pop("rope_theta", raw.get("rope_theta", 10000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise Refusal(
            f"rope_type={kind!r} in {origin}",
            "must be default, linear, llama3 or yarn",
            "use a model with one of these",
        )
    attention_bias = bool(raw.get("attention_bias", False))
    eos = raw.get("eos_token_id")
    return ModelShape(
        family=family,
        hidden_size=raw["hidden_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=raw["num_attention_heads"],
        num_kv_heads=raw.get("num_key_value_heads") or raw["num_attention_heads"],
        head_dim=raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
        ffn_size=raw["intermediate_size"],
        vocab_size=raw["vocab_size"],
        tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=switches["qkv_bias"] or attention_bias,
        attention_out_bias=attention_bias and family != "qwen2",
        qk_norm=switches["qk_norm"],
        norm_epsilon=float(raw.get("rms_norm_eps", 1e-6)),
        rope_theta=theta,
        max_positions=int(raw.get("max_position_embeddings", 2048)),
        rope_scaling={} if kind == "default" else rope,
        eos_token_ids=tuple(eos) if isinstance(eos, list) else (() if eos is None else (int(eos),)),
        **(_experts(family, raw, origin) if family in EXPERT_SIZES else {}),
    )


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
