"""The reading of a model's configuration, against transformers' own classes; nothing is trained or generated.

`FUZZED_CONFIGS` in the environment sets how many config.json files are made up of each seed (default 300).
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import random
import re
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers.generation.configuration_utils import GenerationConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megarl.config.model_keys import FOREIGN, KEYS, LENGTH_KEYS, ROPE_THETA, ROPE_THETA_OF, WITHOUT_EFFECT
from megarl.config.model_shape import FAMILIES, ModelShape, model_shape_from_hf, read_model_shape
from megarl.config.quantisation import BLOCK_FP8
from megarl.errors import Refusal
from megarl.policy.forward import rotary_frequencies

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 300,
    "max_position_embeddings": 256,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
#: A configuration of each family as its makers publish it, but for the sizes.
REAL: dict[str, dict[str, Any]] = {
    "llama": {
        "attention_bias": False,
        "mlp_bias": False,
        "pretraining_tp": 1,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
            "rope_type": "llama3",
        },
        "eos_token_id": [128, 129],
    },
    "mistral": {"sliding_window": None, "rope_theta": 1000000.0, "head_dim": 16, "eos_token_id": 2},
    "qwen2": {
        "use_sliding_window": False,
        "sliding_window": 128,
        "max_window_layers": 2,
        "rope_theta": 1000000.0,
        "use_mrope": False,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        "eos_token_id": 151,
    },
    "qwen3": {
        "head_dim": 16,
        "attention_bias": False,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": 4,
        "eos_token_id": 151,
    },
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 48, "decoder_sparse_step": 1, "qkv_bias": True},
    "qwen3_moe": EXPERTS
    | {"head_dim": 16, "mlp_only_layers": [1], "max_window_layers": 4, "router_aux_loss_coef": 0.001},
    "mixtral": {
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.02,
        "output_router_logits": False,
        "rope_theta": 1000000.0,
        "sliding_window": None,
    },
}
COMMON: dict[str, Any] = {
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.1",
    "use_cache": True,
    "_name_or_path": "a/model",
}


def real(family: str, **changes: Any) -> dict[str, Any]:
    """The configuration of a family with `changes`; ... leaves a key out."""
    base = {"architectures": [FAMILIES[family].architecture], "model_type": family}
    raw = base | COMMON | SIZES | REAL[family] | changes
    return {key: value for key, value in raw.items() if value is not ...}


def theirs(raw: dict[str, Any]) -> Any:
    """transformers' reading."""
    config_class = transformers.AutoConfig.for_model(raw["model_type"]).__class__
    return config_class.from_dict(json.loads(json.dumps(raw)))


def assert_equal(shape: ModelShape, config: Any) -> None:
    """Every number that the policy goes by is that of transformers' configuration."""
    family = shape.family
    found = (shape.hidden_size, shape.num_layers, shape.num_heads, shape.num_kv_heads, shape.ffn_size, shape.vocab_size)
    assert found == (
        config.hidden_size, config.num_hidden_layers, config.num_attention_heads,
        config.num_key_value_heads, config.intermediate_size, config.vocab_size,
    )  # fmt: skip
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    assert (shape.head_dim, shape.norm_epsilon) == (head_dim, config.rms_norm_eps)
    assert shape.tied_embeddings == config.tie_word_embeddings
    bias = getattr(config, "attention_bias", False) if family in ("llama", "qwen3", "qwen3_moe") else False
    assert shape.attention_out_bias == bias
    assert shape.qkv_bias == (bias or family.startswith("qwen2"))
    assert shape.max_positions <= config.max_position_embeddings
    assert shape.rope_theta == config.rope_parameters["rope_theta"]
    kind = config.rope_parameters["rope_type"]
    frequencies, scaling = rotary_frequencies(shape)
    if kind == "default":
        assert not shape.rope_scaling and scaling == 1.0
    else:
        wanted, factor = ROPE_INIT_FUNCTIONS[kind](config, None)
        assert scaling == factor and (frequencies == wanted).all()
    if family not in ("qwen2_moe", "qwen3_moe", "mixtral"):
        return
    experts = (shape.num_experts, shape.experts_per_token)
    assert experts == (config.num_experts, config.num_experts_per_tok)
    size = config.intermediate_size if family == "mixtral" else config.moe_intermediate_size
    assert shape.expert_ffn_size == size
    assert shape.normalize_topk == (True if family == "mixtral" else config.norm_topk_prob)
    assert shape.router_aux_loss == (config.router_aux_loss_coef if config.output_router_logits else 0.0)
    if family == "qwen2_moe":
        assert shape.shared_expert_ffn_size == config.shared_expert_intermediate_size
    if family != "mixtral":
        dense, step = config.mlp_only_layers, config.decoder_sparse_step
        wanted = tuple(i not in dense and (i + 1) % step == 0 for i in range(config.num_hidden_layers))
        assert shape.sparse_layers == wanted


@pytest.mark.parametrize("family", KEYS)
def test_keys_and_defaults_are_those_of_transformers(family: str):
    made = transformers.AutoConfig.for_model(family).__class__
    fields = {field.name: field.default for field in dataclasses.fields(made)}
    assert {name: key.default for name, key in KEYS[family].items()} == {
        name: KEYS[family][name].default if default is dataclasses.MISSING else default
        for name, default in fields.items()
    }
    assert ROPE_THETA_OF.get(family, ROPE_THETA) == made.default_theta
    for name, key in KEYS[family].items():
        if key.null:
            made.from_dict({name: None})
    assert set(GenerationConfig._get_default_generation_params()) <= WITHOUT_EFFECT | KEYS[family].keys()


@pytest.mark.parametrize("family", KEYS)
def test_what_is_left_out_is_transformers_default(family: str):
    """All optional keys at once, and each by itself."""
    needed = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    # By default Mistral attends to 4096 tokens, and a Qwen of experts has thousands of rows.
    bare = {"model_type": family} | {key: SIZES[key] for key in needed} | {"sliding_window": None}
    bare |= {"num_attention_heads": 32} if family != "qwen2_moe" else {"num_attention_heads": 16}
    bare |= {"vocab_size": 32000, "hidden_size": 256}
    assert_equal(model_shape_from_hf(bare), theirs(bare))
    whole = real(family)
    for key in whole:
        if key not in (*needed, "model_type", "sliding_window", "num_key_value_heads"):
            raw = real(family, **{key: ...})
            assert_equal(model_shape_from_hf(raw), theirs(raw))


def test_the_length_before_scaling_may_stand_beside_the_scaling():
    yarn = {"rope_type": "yarn", "factor": 4.0}
    beside = real("mistral", rope_scaling=yarn, original_max_position_embeddings=32)
    inside = real("mistral", rope_parameters=yarn | {"original_max_position_embeddings": 32})
    shape = model_shape_from_hf(beside)
    assert shape == model_shape_from_hf(inside)
    assert shape.rope_scaling["original_max_position_embeddings"] == 32
    assert_equal(shape, theirs(beside))
    # 32 x 4 positions are all that vLLM's table has.
    assert shape.max_positions == 128
    without = real("mistral", rope_scaling=yarn)
    assert model_shape_from_hf(without).rope_scaling["original_max_position_embeddings"] == 256


def test_engine_lengths():
    """vLLM allows no more than the least of these."""
    assert model_shape_from_hf(real("qwen3", max_sequence_length=100)).max_positions == 100
    assert model_shape_from_hf(real("qwen3", model_max_length=10**30)).max_positions == 256


LLAMA3 = REAL["llama"]["rope_scaling"]
#: A family, what is changed, and what is said of it.
IN_FP8 = BLOCK_FP8 | {"ignored_layers": ["lm_head"]}

REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "dtype": (
        "qwen2",
        {"dtype": "float32"},
        "torch_dtype='bfloat16' and dtype='float32' in config.json: must be the same",
    ),
    "no dtype": (
        "qwen2",
        {"torch_dtype": "torch.bfloat16"},
        "torch_dtype='torch.bfloat16' in config.json: must be float32,",
    ),
    "experts": (
        "qwen3_moe",
        {"num_local_experts": 4},
        "num_local_experts=4 and num_experts=8 in config.json: must be the",
    ),
    "experts of mixtral": ("mixtral", {"num_experts": 4}, "num_experts=4 and num_local_experts=8"),
    "other experts": (
        "qwen2_moe",
        {"num_local_experts": 8},
        "num_local_experts=8 in config.json: is not known for qwen2_moe",
    ),
    "theta": (
        "qwen3",
        {"rope_parameters": {"rope_theta": 1e4}},
        "rope_parameters.rope_theta=10000.0 and rope_theta=1000000",
    ),
    "scaling": ("llama", {"rope_parameters": LLAMA3 | {"factor": 4.0}}, "rope_scaling={'factor': 8.0"),
    "rope type": ("llama", {"rope_scaling": LLAMA3 | {"type": "yarn"}}, "rope_type='llama3' and type='yarn'"),
    "original length": (
        "llama",
        {"original_max_position_embeddings": 32},
        "rope_scaling.original_max_position_embeddings=64 and original_max_position_embeddings=32",
    ),
    "no rope type": (
        "qwen3",
        {"rope_scaling": {"factor": 4.0}},
        "rope_scaling.factor=4.0 in config.json: is no number of a default",
    ),
    "mrope": (
        "qwen3",
        {"rope_scaling": {"type": "mrope", "mrope_section": [1]}},
        "rope_type='mrope' in config.json: must be default,",
    ),
    "dynamic": ("qwen3", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic' in config.json"),
    "partial": ("qwen3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor in config.json: must be 1, and is 0.5"),
    "head": ("qwen2", {"head_dim": 32}, "head_dim=32 in config.json: must be hidden_size / num_attention_heads = 16"),
    "quantized": (
        "llama",
        {"quantization_config": {"quant_method": "awq", "bits": 4}},
        "quantization_config with quant_method=awq in config.json: must be quant_method=fp8,",
    ),
    "a scale per tensor": (
        "llama",
        {"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"}},
        "quantization_config without weight_block_size in config.json",
    ),
    "other blocks": (
        "qwen3",
        {"quantization_config": BLOCK_FP8 | {"weight_block_size": [64, 128]}},
        "quantization_config with weight_block_size=[64, 128] in config.json",
    ),
    "no table": ("qwen3", {"quantization_config": "fp8"}, "quantization_config=fp8 in config.json"),
    "compressed": ("llama", {"compression_config": {}}, "says that the weights are compressed"),
    "dual chunks": (
        "qwen2",
        {"dual_chunk_attention_config": {"chunk_size": 64}},
        "dual_chunk_attention_config in config.json: changes attention",
    ),
    "layer types": ("llama", {"layer_types": ["full_attention"] * 3 + ["sliding_attention"]}, "layer_types=["),
    "window of llama": ("llama", {"sliding_window": 64}, "sliding_window=64 in config.json: sliding-window attention"),
    "window of qwen": (
        "qwen3_moe",
        {"use_sliding_window": True, "sliding_window": 64},
        "sliding_window=64 in config.json",
    ),
    "biases": (
        "mistral",
        {"attention_bias": True},
        "attention_bias=True in config.json: adds biases that the policy lacks",
    ),
    "mlp biases": ("llama", {"mlp_bias": True}, "mlp_bias=true in config.json: must be false"),
    "biases of qkv": ("qwen2_moe", {"qkv_bias": False}, "qkv_bias=false in config.json: must be true"),
    "no cause": ("qwen2", {"is_causal": False}, "is_causal=False in config.json: must be true"),
    "cap": ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0 in config.json: changes logits"),
    "scale": ("llama", {"logit_scale": 0.5}, "logit_scale=0.5 in config.json: scales"),
    "multiplier": ("llama", {"embedding_multiplier": 12.0}, "embedding_multiplier=12.0 in config.json: scales"),
    "further layers": (
        "qwen3",
        {"num_nextn_predict_layers": 1},
        "num_nextn_predict_layers=1 in config.json: adds layers",
    ),
    "unknown": ("qwen3", {"n_head_kv": 2}, "n_head_kv=2 in config.json: is not known for qwen3"),
    "images": ("qwen2", {"text_config": {"hidden_size": 8}}, "text_config in config.json: says that this"),
    "code": ("qwen2", {"auto_map": {"AutoModel": "m.M"}}, "auto_map in config.json: names code"),
    "text": ("qwen2", {"hidden_size": "64"}, "hidden_size='64' in config.json: must be a whole number of at least 1"),
    "no number": ("qwen2", {"rms_norm_eps": float("nan")}, "rms_norm_eps=nan in config.json: must be a number above 0"),
    "whole": ("qwen2", {"rms_norm_eps": 1}, "written with a decimal point. Fix: write it as 1.0"),
    "huge": (
        "qwen2",
        {"num_hidden_layers": 10**9},
        "num_hidden_layers=1000000000 in config.json: must be a whole number of at",
    ),
    "null": (
        "qwen3_moe",
        {"num_key_value_heads": None},
        "num_key_value_heads=None in config.json: must be a whole number",
    ),
    "default heads": (
        "mistral",
        {"num_key_value_heads": ...},
        "num_key_value_heads=8 (mistral's default) in config.json: must divide",
    ),
    "default window": (
        "mistral",
        {"sliding_window": ..., "max_position_embeddings": ...},
        "sliding_window=4096 in config.json",
    ),
    "end": ("qwen2", {"eos_token_id": 300}, "eos_token_id=300 in config.json: must be below vocab_size=300"),
    "end in a list": (
        "qwen2",
        {"eos_token_id": [2, "2"]},
        "eos_token_id=[2, '2'] in config.json: must be a token's number",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str):
    family, changes, message = REFUSED[name]
    with pytest.raises(Refusal) as found:
        model_shape_from_hf(real(family, **changes))
    assert str(found.value).startswith(message) or message in str(found.value)
    assert_equal(model_shape_from_hf(real(family)), theirs(real(family)))


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        (
            "qwen2",
            {
                "dtype": "bfloat16",
                "quantization_config": IN_FP8,
                "is_causal": True,
                "unsloth_version": "2024.9",
            },
        ),
        ("qwen2", {"rope_parameters": {**REAL["qwen2"]["rope_scaling"], "rope_theta": 1000000.0}}),
        ("llama", {"layer_types": ["full_attention"] * 4, "sliding_window": 256, "logit_scale": 1.0}),
        ("qwen3_moe", {"num_local_experts": 8, "rope_scaling": {"type": "default"}}),
        ("mixtral", {"num_local_experts": ..., "num_experts": 4}),
        ("mistral", {"sliding_window": 4096}),
    ],
)
def test_two_spellings_that_agree_and_keys_without_effect(family: str, changes: dict[str, Any]):
    raw = real(family, **changes)
    assert_equal(model_shape_from_hf(raw), theirs(raw))


# --- folders ---------------------------------------------------------------------------------------------------------


def folder_with(path: Path, **files: str) -> Path:
    """A folder with these files; double underscores stand for dots."""
    path.mkdir(exist_ok=True)
    for name, text in files.items():
        (path / name.replace("__", ".")).write_text(text)
    return path


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"adapter_config__json": "{}"}, "is an adapter (adapter_config.json), not a whole model"),
        ({"adapter_config__json": "{}", "config__json": "{}"}, "is an adapter"),
        ({"model__gguf": ""}, "holds GGUF files, which are not trained"),
        ({"params__json": "{}"}, "holds a model in its maker's own format (params.json)"),
        ({"config__json": "{}", "hf_quant_config__json": "{}"}, "holds quantized weights (hf_quant_config.json)"),
        ({}, "must be a Hugging Face checkpoint directory with a config.json"),
        ({"config__json": "[]"}, "must be a JSON object"),
        ({"config__json": '{"model_type": NaN}'}, "model_type=nan in"),
        ({"config__json": '{"hidden_size": 1, "hidden_size": 2}'}, "hidden_size=1 and hidden_size again=2 in"),
        ({"config__json": "[" * 100000}, "must be JSON, and is nested too deeply"),
        ({"config__json": '{"model_type": "qwen2", "hidden_size": ' + "9" * 5000 + "}"}, "must be JSON (Exceeds"),
        ({"config__json": '{"model_type": ["qwen2"]}'}, "model_type=['qwen2'] in"),
    ],
)
def test_folders_that_hold_something_else(files: dict[str, str], message: str, tmp_path: Path):
    with pytest.raises(Refusal) as found:
        read_model_shape(folder_with(tmp_path / "model", **files))
    assert message in str(found.value)


def test_what_ends_an_answer_is_the_set_of_both_files(tmp_path: Path):
    def ends(generation: str | None, **changes: Any) -> tuple[int, ...]:
        files = {"config__json": json.dumps(real("llama", **changes))}
        folder = folder_with(tmp_path / "model", **files)
        (folder / "generation_config.json").unlink(missing_ok=True)
        if generation is not None:
            (folder / "generation_config.json").write_text(generation)
        return read_model_shape(folder).eos_token_ids

    assert ends('{"eos_token_id": [130, 128]}') == (128, 129, 130)
    assert ends('{"eos_token_id": 7}', eos_token_id=None) == (7,)
    assert ends("{}") == (128, 129)
    # The class's default, by which vLLM stops where nothing else is said, and there alone.
    assert ends(None, eos_token_id=...) == (2,) and ends("{}", eos_token_id=...) == ()
    with pytest.raises(Refusal, match=r"eos_token_id=300 in .*generation_config\.json: must be below vocab_size=300"):
        ends('{"eos_token_id": [2, 300]}')
    for value in ("'2'", "[True]", "-1", "2.0"):
        said = rf"eos_token_id={re.escape(value)} in .*generation_config\.json: must be a token's number, at least 0, "
        with pytest.raises(Refusal, match=f"{said}.*Fix: restore the original generation_config\\.json"):
            ends(json.dumps({"eos_token_id": eval(value)}))
    with pytest.raises(Refusal, match=r"nested too deeply\. Fix: restore the original generation_config\.json"):
        ends("[" * 100_000)
    with pytest.raises(Refusal, match=r"generation_config\.json: must be a JSON object"):
        ends("[]")


# --- made up ---------------------------------------------------------------------------------------------------------

VALUES: tuple[Any, ...] = (
    None, 0, 1, 2, 3, -1, 64, 1.0, 0.5, 1e6, 10**9, 10**30, float("nan"), float("inf"), True, False, "", "2", "auto",
    "silu", [], [1], [1, 2], ["full_attention"] * 4, {}, {"a": 1}, {"rope_type": "yarn", "factor": 2.0},
    {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}, {"type": "llama3"}, [[[]]], "x" * 1000, 10**400,
)  # fmt: skip
OTHERS = (
    *FOREIGN, *LENGTH_KEYS, "rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings",
    "partial_rotary_factor", "n_embd", "n_layer", "num_kv_heads", "num_experts", "num_local_experts", "head_dim",
    "layer_types", "sliding_window", "use_sliding_window", "num_labels", "kv_lora_rank", "mlp_layer_types", "dtype",
    "rotary_pct", "target_layer_count", "llama_4_scaling", "use_cache", "eos_token_id", "id2label", "problem_type",
)  # fmt: skip


def mutated(chance: random.Random) -> dict[str, Any]:
    """A configuration of a family with one to three things wrong or odd about it."""
    raw = real(chance.choice(list(KEYS)))
    for _ in range(chance.randint(1, 3)):
        key = chance.choice(list(raw))
        kind = chance.randrange(6)
        if kind == 0:
            raw.pop(key)
        elif kind == 1:
            raw[key] = chance.choice(VALUES)
        elif kind == 2:
            raw[chance.choice(OTHERS)] = chance.choice(VALUES)
        elif kind == 3:
            family = chance.choice(list(KEYS))
            other = chance.choice(list(real(family)))
            raw[other] = real(family)[other]
        elif kind == 4 and isinstance(raw[key], int) and abs(raw[key]) < 10**9:
            raw[key] = chance.choice((raw[key] * 2, raw[key] - 1, -raw[key], float(raw[key]), str(raw[key])))
        elif isinstance(raw.get("rope_scaling"), dict):
            inner = dict(raw["rope_scaling"])
            inner[chance.choice([*inner, "rope_theta", "type", "attention_factor", "truncate"])] = chance.choice(VALUES)
            raw["rope_scaling" if chance.random() < 0.7 else "rope_parameters"] = inner
        raw.setdefault("model_type", "qwen2")
    return raw


@pytest.mark.parametrize("seed", [0])
def test_made_up_configurations_are_refused_or_read_as_transformers_reads_them(seed: int, tmp_path: Path):
    logging.getLogger("transformers").setLevel(logging.ERROR)
    chance, accepted = random.Random(seed), 0
    number = int(os.environ.get("FUZZED_CONFIGS", "300"))
    for _ in range(number):
        raw = mutated(chance)
        text = json.dumps(raw)
        (tmp_path / "config.json").write_text(text)
        try:
            shape = read_model_shape(tmp_path)
        except Refusal as refusal:
            assert refusal.value and refusal.rule and refusal.fix and len(str(refusal)) < 700, text
            continue
        try:
            assert_equal(shape, theirs(raw))
        except Exception as error:
            raise AssertionError(f"{text}: {error}") from error
        accepted += 1
    assert number // 8 < accepted < number * 3 // 4
