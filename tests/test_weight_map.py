"""The weight map against transformers' checkpoints and against shards made the naive way."""

from dataclasses import replace

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from reshard_reference import (
    make_shape,
    megatron_reference,
    random_checkpoint,
    rank_tensors,
    shapes,
    slice_reader,
    vllm_reference,
)
from safetensors import safe_open

from megarl.config.model_shape import read_model_shape
from megarl.errors import Refusal
from megarl.reshard.copying import read_local
from megarl.reshard.weight_map import (
    check_hf_shapes,
    hf_tensors,
    padded_vocab_size,
    vllm_tensors,
)

CONFIGS = {
    "llama": ("llama", {}),
    "llama with biases": ("llama", {"attention_bias": True}),
    "llama with wide heads": ("llama", {"head_dim": 10, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {"tie_word_embeddings": False}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 6, "tie_word_embeddings": False}),
    "qwen3 tied with biases": ("qwen3", {"head_dim": 6, "tie_word_embeddings": True, "attention_bias": True}),
}


def saved_model(name, folder):
    """A tiny model of transformers' own, saved in the Hugging Face format."""
    family, changes = CONFIGS[name]
    config = transformers.AutoConfig.for_model(
        family,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=24,
        vocab_size=50,
        **changes,
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", CONFIGS)
def test_hf_tensors_are_those_that_transformers_saves(name, tmp_path):
    saved_model(name, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        saved = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    shape = read_model_shape(tmp_path)
    assert hf_tensors(shape) == saved
    check_hf_shapes(shape, saved, "model.safetensors")


def test_shards_are_read_from_a_file_by_slices(tmp_path):
    """A rank of a middle stage reads a transformers checkpoint through `get_slice`: its own part and no more."""
    shape = read_model_shape(saved_model("qwen2 tied", tmp_path))
    read = 0
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        whole = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

        def reader(name, box):
            nonlocal read
            data = file.get_slice(name)[tuple(slice(start, stop) for start, stop in box)]
            read += data.numel()
            return data

        layout = rank_tensors(shape, tensor=2, pipeline=3, tensor_rank=1, pipeline_rank=1)
        shards = {name: read_local(tensor, reader) for name, tensor in layout.items()}
    expected = megatron_reference(shape, whole, 2, 3, 1, 1)
    assert shards.keys() == expected.keys()
    assert all(torch.equal(shards[name], expected[name]) for name in expected)
    assert read == sum(tensor.numel() for tensor in expected.values())


@settings(deadline=None, max_examples=60)
@given(shapes(), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2]), st.data())
def test_megatron_shards_equal_chunks_of_the_fused_tensors(shape, tensor, pipeline, data):
    checkpoint = random_checkpoint(shape)
    rank, stage = data.draw(st.integers(0, tensor - 1)), data.draw(st.integers(0, pipeline - 1))
    layout = rank_tensors(shape, tensor=tensor, pipeline=pipeline, tensor_rank=rank, pipeline_rank=stage)
    expected = megatron_reference(shape, checkpoint, tensor, pipeline, rank, stage)
    assert layout.keys() == expected.keys()
    for name, value in expected.items():
        assert layout[name].shape == tuple(value.shape), name
        assert torch.equal(read_local(layout[name], slice_reader(checkpoint), torch.float64), value), name


@settings(deadline=None, max_examples=60)
@given(shapes(), st.sampled_from([1, 2, 4]), st.data())
def test_vllm_shards_equal_chunks_of_the_whole_tensors(shape, tensor, data):
    checkpoint = random_checkpoint(shape)
    rank = data.draw(st.integers(0, tensor - 1))
    layout = vllm_tensors(shape, tensor=tensor, tensor_rank=rank)
    expected = vllm_reference(shape, checkpoint, tensor, rank)
    assert layout.keys() == expected.keys()
    for name, value in expected.items():
        assert layout[name].shape == tuple(value.shape), name
        assert torch.equal(read_local(layout[name], slice_reader(checkpoint), torch.float64), value), name


def test_padded_vocabulary_does_not_depend_on_a_power_of_two():
    assert {padded_vocab_size(32_000, tensor) for tensor in (1, 2, 4, 8, 128)} == {32_000}
    assert {padded_vocab_size(32_001, tensor) for tensor in (1, 2, 4, 8, 128)} == {32_128}
    assert padded_vocab_size(32_001, 5) == 32_640
    assert padded_vocab_size(10, 2, multiple=4) == 12


REFUSED = {
    "policy": (
        lambda: rank_tensors(make_shape(), tensor=3, pipeline=1, tensor_rank=0, pipeline_rank=0),
        r"parallel\.tensor=3: must divide the model's 4 attention heads",
    ),
    "engine": (
        lambda: vllm_tensors(make_shape(ffn_size=6), tensor=4, tensor_rank=0),
        r"rollout\.tensor=4: must divide the model's MLP size of 6",
    ),
    "layers": (
        lambda: rank_tensors(make_shape(num_layers=6), tensor=1, pipeline=4, tensor_rank=0, pipeline_rank=0),
        r"parallel\.pipeline=4: must divide the model's 6 layers\. Fix: use 1, 2, 3 or 6, or write",
    ),
    "no place in vLLM": (
        lambda: vllm_tensors(make_shape("qwen3", attention_out_bias=True), tensor=1, tensor_rank=0),
        r"model\.layers\.0\.self_attn\.o_proj\.bias of a qwen3 model: has no place in vLLM's class",
    ),
    "family": (
        lambda: hf_tensors(replace(make_shape(), family="gpt2")),
        r"model family 'gpt2': must be one of "
        r"\['llama', 'mistral', 'mixtral', 'qwen2', 'qwen2_moe', 'qwen3', 'qwen3_moe'\]",
    ),
    "missing": (
        lambda: check_hf_shapes(make_shape(), {}, "model.safetensors"),
        r"model\.safetensors without model\.embed_tokens\.weight",
    ),
    "other shape": (
        lambda: check_hf_shapes(make_shape(), hf_tensors(make_shape()) | {"model.norm.weight": (9,)}, "a.safetensors"),
        r"model\.norm\.weight of shape \(9,\) in a\.safetensors: must have shape \(12,\)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_value_rule_and_fix(case):
    attempt, message = REFUSED[case]
    with pytest.raises(Refusal, match=message):
        attempt()


def test_every_rank_has_a_place_for_a_vocabulary_smaller_than_the_split():
    """With 3 tokens over 4 ranks the last ranks hold nothing but padding."""
    layouts = [vllm_tensors(make_shape(vocab_size=3), tensor=4, tensor_rank=rank) for rank in range(4)]
    embeddings = [layout["model.embed_tokens.weight"] for layout in layouts]
    assert [tensor.shape for tensor in embeddings] == [(16, 12)] * 4
    assert [len(tensor.regions) for tensor in embeddings] == [1, 0, 0, 0]
