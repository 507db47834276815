"""Real Megatron modules against `megatron_tensors`, in two processes: names, shapes, and what loaded shards compute."""

import parity
import pytest
import torch
import torch.nn.functional as F
from reshard_reference import make_shape, rank_tensors, slice_reader

from megarl.reshard.copying import read_local
from megarl.reshard.weight_map import hf_tensors

#: (model, tensor, pipeline) on two processes; one key-value head for two ranks is Megatron's other way to cut.
CASES = {
    "qwen2, 4 heads, 2 groups": (make_shape("qwen2"), 2, 1),
    "qwen2, 4 heads, 1 group": (make_shape("qwen2", num_kv_heads=1, tied_embeddings=True), 2, 1),
    "qwen2, 4 groups": (make_shape("qwen2", num_kv_heads=4), 2, 1),
    "llama, 6 heads, 1 group": (make_shape("llama", num_heads=6, num_kv_heads=1, vocab_size=129), 2, 1),
    "qwen3": (make_shape("qwen3", head_dim=8), 2, 1),
    "qwen2 tied, two stages": (make_shape("qwen2", tied_embeddings=True), 1, 2),
    "llama, two stages": (make_shape("llama"), 1, 2),
}


def build(shape, tensor, pipeline):
    """Megatron's GPT model of this rank, as the policy builds it, with process groups of its own."""
    from megatron.core import parallel_state

    from megarl.config.grid import chunks_of_stage
    from megarl.config.schema import RunConfig
    from megarl.policy.megatron_config import transformer_config
    from megarl.policy.model import build_model

    config = RunConfig.model_validate(
        {
            "name": "weight-map",
            "steps": 0,
            "precision": "fp32",
            "model": {"path": "unused"},
            "data": {"path": "unused"},
            "algorithm": {"name": "grpo"},
            "parallel": {"tensor": tensor, "pipeline": pipeline},
            "megatron": {"use_cpu_initialization": True},
        }
    )
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tensor, pipeline)
    stage = parallel_state.get_pipeline_model_parallel_rank()
    chunks = chunks_of_stage(shape.num_layers, config.parallel, stage)
    (chunk,) = build_model(transformer_config(config, shape), shape, chunks)
    return chunk


def faults_of(case, rank):
    """What differs between Megatron's model and the layout, as text."""
    shape, tensor, pipeline = CASES[case]
    model = build(shape, tensor, pipeline)
    layout = rank_tensors(
        shape, tensor=tensor, pipeline=pipeline, tensor_rank=rank % tensor, pipeline_rank=rank // tensor
    )
    real = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    ours = {name: one.shape for name, one in layout.items()}
    if real != ours:
        return [str(sorted(real.items() ^ ours.items()))]
    random = torch.Generator().manual_seed(2)
    checkpoint = {name: torch.randn(dims, generator=random) for name, dims in hf_tensors(shape).items()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(read_local(layout[name], slice_reader(checkpoint), torch.float32))
        hidden = torch.randn(5, 1, shape.hidden_size, generator=random)
        first = rank // tensor * (shape.num_layers // pipeline)
        hf = {
            name.removeprefix(f"model.layers.{first}."): value
            for name, value in checkpoint.items()
            if name.startswith(f"model.layers.{first}.")
        }
        return attention_faults(model.decoder.layers[0].self_attention, shape, hf, hidden, tensor, rank % tensor) + (
            mlp_faults(model.decoder.layers[0].mlp, shape, hf, hidden)
        )


def attention_faults(attention, shape, hf, hidden, tensor, rank):
    """Queries, keys and values of this rank against those of the checkpoint's own matrices."""
    found = attention.get_query_key_value_tensors(hidden)
    normed = F.rms_norm(hidden, (shape.hidden_size,), hf["input_layernorm.weight"], shape.norm_epsilon)
    faults = []
    for part, local in zip("qkv", found, strict=True):
        heads = F.linear(normed, hf[f"self_attn.{part}_proj.weight"], hf.get(f"self_attn.{part}_proj.bias"))
        heads = heads.unflatten(-1, (-1, shape.head_dim))
        if f"self_attn.{part}_norm.weight" in hf:
            weight = hf[f"self_attn.{part}_norm.weight"]
            heads = F.rms_norm(heads, (shape.head_dim,), weight, shape.norm_epsilon)
        # Ranks beyond the number of heads share one: each head is repeated to fill them.
        heads = heads.repeat_interleave(max(1, tensor // heads.shape[2]), 2)
        if not torch.allclose(local, heads.chunk(tensor, 2)[rank], rtol=1e-4, atol=1e-5):
            faults.append(f"{part} heads differ")
    return faults


def mlp_faults(mlp, shape, hf, hidden):
    """The MLP's output, summed over the ranks, against that of the checkpoint's own matrices."""
    found, _ = mlp(hidden)
    normed = F.rms_norm(hidden, (shape.hidden_size,), hf["post_attention_layernorm.weight"], shape.norm_epsilon)
    inner = F.silu(F.linear(normed, hf["mlp.gate_proj.weight"])) * F.linear(normed, hf["mlp.up_proj.weight"])
    close = torch.allclose(found, F.linear(inner, hf["mlp.down_proj.weight"]), rtol=1e-4, atol=1e-4)
    return [] if close else ["MLP output differs"]


def all_faults(world):
    """What differs, by case. A scenario of `run_world`."""
    return {case: faults_of(case, world.rank) for case in CASES}


@pytest.mark.skipif(torch.cuda.is_available(), reason="two processes over gloo on the CPU")
def test_megatron_computes_the_same_with_shards_of_the_layout():
    assert parity.run_world("test_weight_map_megatron", "all_faults", 2) == [{case: [] for case in CASES}] * 2
