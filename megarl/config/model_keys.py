"""The keys of a model's `config.json`: which are obeyed, with the defaults, and which are without effect. Torch-free.

A closed list. `KEYS` holds the fields of transformers' configuration classes, with their defaults; transformers itself
takes seconds to import, and torch with it, so that a test compares the two instead. Beside them there are keys that
neither transformers nor vLLM obeys for these families, and keys that one of them obeys and the policy does not, with
the values under which they change nothing. Any other key is refused: nobody has looked at what it does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeGuard

#: Sizes beyond these are taken for mistakes: they would take hours to lay out, or more memory than there is.
LARGEST, MOST_HEADS, MOST_LAYERS, MOST_EXPERTS = 1 << 24, 4096, 1024, 1024
#: Numbers such as the rotary base stay below this; fp32 still has them.
LARGEST_NUMBER = 1e15

#: The types that weights are stored in, as config.json names them.
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class Key:
    """A key of `config.json`: what stands for it where it is left out, what it must be, and whether it may be null.

    `least` and `most` bound whole numbers.
    """

    default: Any
    kind: str
    null: bool = False
    least: int = 1
    most: int = LARGEST

    @property
    def rule(self) -> str:
        """What a value must be, in words that follow "must be"."""
        return KINDS[self.kind][0].format(least=self.least, most=self.most) + (", or null" if self.null else "")

    def allows(self, value: Any) -> bool:
        """Whether transformers' class and the policy take `value`."""
        if value is None:
            return self.null
        if self.kind == "whole":
            return _whole(value) and self.least <= value <= self.most
        return KINDS[self.kind][1](value)


def is_number(value: Any) -> TypeGuard[float]:
    """Whether `value` is a number above 0 that fp32 has; not NaN, nor infinite."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= LARGEST_NUMBER


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _labels(value: Any) -> bool:
    return isinstance(value, dict) and all(key.isdecimal() and len(key) < 10 for key in map(str, value))


#: By kind: what a value must be, and whether it is.
KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "whole": ("a whole number of at least {least} and at most {most}", _whole),
    # Transformers refuses a whole number here.
    "fraction": (
        "a number above 0, written with a decimal point",
        lambda value: is_number(value) and not _whole(value),
    ),
    "scale": (
        "a number from 0 to 1, written with a decimal point",
        lambda value: isinstance(value, float) and 0 <= value <= 1,
    ),
    "rate": ("a number from 0 to 1", lambda value: value in (0, 1) or KINDS["scale"][1](value)),
    "switch": ("true or false", lambda value: isinstance(value, bool)),
    "text": ("a text", lambda value: isinstance(value, str)),
    "token": ("a whole number", _whole),
    "tokens": (
        "a token's number, at least 0, or a list of them",
        lambda value: all(_whole(one) and one >= 0 for one in (value if isinstance(value, list) else [value])),
    ),
    "layers": (
        "a list of layers' numbers",
        lambda value: isinstance(value, list) and all(_whole(one) for one in value),
    ),
    "names": (
        "a list of names",
        lambda value: isinstance(value, list) and all(isinstance(one, str) for one in value),
    ),
    "table": ("a table", lambda value: isinstance(value, dict)),
    "labels": ("a table from numbers to names", _labels),
    "dtype": ("float32, bfloat16 or float16", lambda value: value in DTYPES),
    "any": ("anything", lambda value: True),
}

_COMMON: dict[str, Key] = {
    "hidden_size": Key(4096, "whole"),
    "num_hidden_layers": Key(32, "whole", most=MOST_LAYERS),
    "num_attention_heads": Key(32, "whole", most=MOST_HEADS),
    "num_key_value_heads": Key(None, "whole", null=True, most=MOST_HEADS),
    "vocab_size": Key(32000, "whole"),
    "max_position_embeddings": Key(32768, "whole"),
    "hidden_act": Key("silu", "text"),
    "rms_norm_eps": Key(1e-6, "fraction"),
    "rope_parameters": Key(None, "table", null=True),
    "tie_word_embeddings": Key(False, "switch"),
    "eos_token_id": Key(None, "tokens", null=True),
    "bos_token_id": Key(None, "token", null=True),
    "pad_token_id": Key(None, "token", null=True),
    "initializer_range": Key(0.02, "scale"),
    # Of training alone; the policy's is 0, as of every model that is trained by reinforcement.
    "attention_dropout": Key(0.0, "rate"),
    "use_cache": Key(True, "switch"),
    "dtype": Key(None, "dtype", null=True),
    "architectures": Key(None, "names", null=True),
    "is_encoder_decoder": Key(False, "switch"),
    "id2label": Key(None, "labels", null=True),
    "label2id": Key(None, "table", null=True),
    "problem_type": Key(None, "any", null=True),
    "transformers_version": Key(None, "any", null=True),
    "output_hidden_states": Key(False, "any", null=True),
    "return_dict": Key(True, "any", null=True),
    "chunk_size_feed_forward": Key(0, "any", null=True),
}
_LLAMA: dict[str, Key] = {"bos_token_id": Key(1, "token", null=True), "eos_token_id": Key(2, "tokens", null=True)}
_QWEN: dict[str, Key] = {
    "vocab_size": Key(151936, "whole"),
    "use_sliding_window": Key(False, "switch"),
    "sliding_window": Key(4096, "token", null=True),
}
_LAYER_TYPES: dict[str, Key] = {
    "max_window_layers": Key(28, "token"),
    "layer_types": Key(None, "names", null=True),
}
_EXPERTS: dict[str, Key] = {
    "output_router_logits": Key(False, "switch"),
    "router_aux_loss_coef": Key(0.001, "scale"),
}
_QWEN_EXPERTS: dict[str, Key] = {
    **_EXPERTS,
    "hidden_size": Key(2048, "whole"),
    "num_hidden_layers": Key(24, "whole", most=MOST_LAYERS),
    "decoder_sparse_step": Key(1, "whole"),
    "mlp_only_layers": Key(None, "layers", null=True),
    "norm_topk_prob": Key(False, "switch"),
}


def _heads(default: int) -> Key:
    return Key(default, "whole", most=MOST_HEADS)


#: By family: the fields of transformers' configuration class, as of transformers 5.19.
KEYS: dict[str, dict[str, Key]] = {
    "llama": {
        **_COMMON,
        **_LLAMA,
        "intermediate_size": Key(11008, "whole"),
        "max_position_embeddings": Key(2048, "whole"),
        "head_dim": Key(None, "whole", null=True),
        "attention_bias": Key(False, "switch"),
        "attention_dropout": Key(0.0, "rate", null=True),
        "mlp_bias": Key(False, "switch"),
        "pretraining_tp": Key(1, "token", null=True),
    },
    "mistral": {
        **_COMMON,
        **_LLAMA,
        "intermediate_size": Key(14336, "whole"),
        "num_key_value_heads": _heads(8),
        "max_position_embeddings": Key(131072, "whole"),
        "head_dim": Key(None, "whole", null=True),
        "sliding_window": Key(4096, "token", null=True),
    },
    "qwen2": {
        **_COMMON,
        **_QWEN,
        **_LAYER_TYPES,
        "intermediate_size": Key(22016, "whole"),
        "num_key_value_heads": Key(32, "whole", null=True, most=MOST_HEADS),
    },
    "qwen3": {
        **_COMMON,
        **_QWEN,
        **_LAYER_TYPES,
        "intermediate_size": Key(22016, "whole"),
        "num_key_value_heads": Key(32, "whole", null=True, most=MOST_HEADS),
        "head_dim": Key(128, "whole"),
        "attention_bias": Key(False, "switch"),
    },
    "qwen2_moe": {
        **_COMMON,
        **_QWEN,
        **_LAYER_TYPES,
        **_QWEN_EXPERTS,
        "intermediate_size": Key(5632, "whole"),
        "num_attention_heads": _heads(16),
        "num_key_value_heads": _heads(16),
        "num_experts": Key(60, "whole", most=MOST_EXPERTS),
        "num_experts_per_tok": Key(4, "whole"),
        "moe_intermediate_size": Key(1408, "whole"),
        "shared_expert_intermediate_size": Key(5632, "whole", least=0),
        "qkv_bias": Key(True, "switch"),
    },
    "qwen3_moe": {
        **_COMMON,
        **_QWEN,
        **_QWEN_EXPERTS,
        "intermediate_size": Key(6144, "whole"),
        "num_key_value_heads": _heads(4),
        "num_experts": Key(128, "whole", most=MOST_EXPERTS),
        "num_experts_per_tok": Key(8, "whole"),
        "moe_intermediate_size": Key(768, "whole"),
        "attention_bias": Key(False, "switch"),
    },
    "mixtral": {
        **_COMMON,
        **_LLAMA,
        **_EXPERTS,
        "intermediate_size": Key(14336, "whole"),
        "num_key_value_heads": _heads(8),
        "max_position_embeddings": Key(131072, "whole"),
        "rms_norm_eps": Key(1e-5, "fraction"),
        "head_dim": Key(None, "whole", null=True),
        "sliding_window": Key(None, "token", null=True),
        "num_local_experts": Key(8, "whole", most=MOST_EXPERTS),
        "num_experts_per_tok": Key(2, "whole"),
        "router_jitter_noise": Key(0.0, "scale"),
    },
}

#: What says the same in other words: the other word, by family ("" for all), and the field that it means.
SPELLINGS: dict[str, dict[str, str]] = {
    "": {"torch_dtype": "dtype"},
    "qwen3_moe": {"num_local_experts": "num_experts"},
    "mixtral": {"num_experts": "num_local_experts"},
}

#: The base of the rotary embedding, which is no field; but for mixtral.
ROPE_THETA, ROPE_THETA_OF = 10000.0, {"mixtral": 1000000.0}

#: Keys of the rotary embedding beside `rope_parameters`; `megarl.config.model_rope` reads them.
ROPE_KEYS = ("rope_scaling", "rope_theta", "original_max_position_embeddings", "partial_rotary_factor")

#: How many positions the engine allows: the least of these that are given, beside max_position_embeddings.
LENGTH_KEYS = ("model_max_length", "max_sequence_length", "max_seq_length", "max_seq_len", "seq_length", "n_positions")

#: Keys that neither transformers nor vLLM obeys for these families: where a checkpoint comes from, defaults of
#: generation, which belong to generation_config.json, and what older versions of transformers wrote.
WITHOUT_EFFECT = frozenset(
    (
        "_name_or_path", "name_or_path", "_commit_hash", "_attn_implementation", "_attn_implementation_autoset",
        "_flash_attn_2_enabled", "_experts_implementation", "attn_implementation", "experts_implementation",
        "output_attentions", "torchscript", "use_bfloat16", "tf_legacy_loss", "finetuning_task",
        "task_specific_params", "tokenizer_class", "prefix", "tie_encoder_decoder", "is_decoder", "bos_token",
        "eos_token", "pad_token", "unk_token", "unk_token_id", "sep_token_id", "cls_token_id", "mask_token_id",
        "decoder_start_token_id", "unsloth_version", "unsloth_fixed", "gradient_checkpointing",
        "model_name", "transformers.js_config",
        "is_llama_config", "max_window_layers", "pretraining_tp", "initializer_range", "rope_interleaved",
        "assistant_confidence_threshold", "assistant_lookbehind", "bad_words_ids", "begin_suppress_tokens",
        "diversity_penalty", "do_sample", "early_stopping", "encoder_no_repeat_ngram_size",
        "encoder_repetition_penalty", "epsilon_cutoff", "eta_cutoff", "exponential_decay_length_penalty",
        "forced_bos_token_id", "forced_eos_token_id", "length_penalty", "max_length", "max_new_tokens", "min_length",
        "no_repeat_ngram_size", "num_assistant_tokens", "num_assistant_tokens_schedule", "num_beam_groups",
        "num_beams", "num_return_sequences", "output_scores", "remove_invalid_values", "repetition_penalty",
        "return_dict_in_generate", "suppress_tokens", "target_lookbehind", "temperature", "top_k", "top_p",
        "typical_p",
    )
)  # fmt: skip

_OTHER = "use a model without it, or remove the key if the weights were trained without it"
_OFF = (None, False)

#: Keys that transformers or vLLM obeys in a way that the policy lacks, or that say that the weights are of another kind
#: of model: the values under which they change nothing, what they mean, and what to do.
FOREIGN: dict[str, tuple[tuple[Any, ...], str, str]] = {
    "auto_map": (
        (None, {}),
        "names code that comes with the checkpoint, which is never run",
        "remove it if the weights are those of a plain {family} model, or use another checkpoint",
    ),
    "compression_config": (
        (None,),
        "says that the weights are compressed in a way that is not read",
        "use the checkpoint that they were made from",
    ),
    **dict.fromkeys(
        ("text_config", "vision_config", "audio_config", "llm_config", "language_config"),
        (
            (None,),
            "says that this is a model of images or sounds, or a part of one",
            "use a model of text alone",
        ),
    ),
    "dual_chunk_attention_config": ((None,), "changes attention over long contexts, which is not supported", _OTHER),
    "is_causal": ((True,), "must be true: tokens see those before them alone", "use a causal language model"),
    "add_cross_attention": (_OFF, "adds attention to another sequence, which is not supported", _OTHER),
    "cross_attention_hidden_size": ((None,), "adds attention to another sequence, which is not supported", _OTHER),
    "pruned_heads": ((None, {}), "removes attention heads, which is not supported", _OTHER),
    "per_layer_config": ((None,), "gives layers sizes of their own, which is not supported", _OTHER),
    "mlp_bias": (_OFF, "must be false", "use a model without MLP biases"),
    "use_mrope": (_OFF, "rotates by position in space, which is not supported", _OTHER),
    "num_nextn_predict_layers": ((None, 0), "adds layers that predict further tokens, which are not trained", _OTHER),
    **dict.fromkeys(("attention_bias", "bias", "qkv_bias"), (_OFF, "adds biases that the policy lacks", _OTHER)),
    **dict.fromkeys(
        ("qk_norm", "use_qk_norm", "qk_layernorm"),
        (_OFF, "normalises queries and keys, which is not supported", _OTHER),
    ),
    **dict.fromkeys(
        ("final_logit_softcapping", "attn_logit_softcapping", "logits_soft_cap", "attention_multiplier"),
        ((None,), "changes logits, which is not supported", _OTHER),
    ),
    **dict.fromkeys(
        ("logits_scaling", "embedding_multiplier", "residual_multiplier", "rope_ratio"),
        ((None, 1), "scales what the policy does not scale", _OTHER),
    ),
    "logit_scale": ((1,), "scales logits, which is not supported", _OTHER),
    **dict.fromkeys(
        ("attention_sinks", "attention_chunk_size", "no_rope_layers", "no_rope_layer_interval", "head_dtype"),
        ((None,), "changes attention or the output layer, which is not supported", _OTHER),
    ),
    "shared_expert_intermediate_size": ((None, 0), "adds a shared expert, which is not supported", _OTHER),
    "alibi": (_OFF, "biases attention by distance, which is not supported", _OTHER),
}

#: By family: keys of `FOREIGN` that do nothing there, as the family has always or never what they say.
HARMLESS_IN: dict[str, frozenset[str]] = {
    "qwen2": frozenset({"attention_bias"}),
    "qwen2_moe": frozenset({"attention_bias"}),
    "qwen3": frozenset({"qk_norm", "use_qk_norm"}),
    "qwen3_moe": frozenset({"qk_norm", "use_qk_norm"}),
}
