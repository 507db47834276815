"""Test helpers: random models, and shards made the naive way, by building whole fused tensors and cutting them."""

import torch
from hypothesis import strategies as st

from megarl.config.grid import Grid
from megarl.config.model_shape import ModelShape
from megarl.config.sections import ParallelSettings
from megarl.reshard.weight_map import hf_tensors, megatron_tensors, padded_vocab_size


def make_shape(family="qwen2", **changes):
    """A tiny model: 2 layers, 4 heads of 4, 2 key-value heads."""
    switches = {"llama": (False, False), "qwen2": (True, False), "qwen3": (False, True)}[family]
    fields = {
        "family": family,
        "hidden_size": 12,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 4,
        "ffn_size": 8,
        "vocab_size": 70,
        "tied_embeddings": False,
        "qkv_bias": switches[0],
        "attention_out_bias": False,
        "qk_norm": switches[1],
        "norm_epsilon": 1e-6,
        "rope_theta": 1e4,
        "max_positions": 64,
    }
    return ModelShape(**(fields | changes))


def rank_tensors(shape, tensor=1, pipeline=1, tensor_rank=0, pipeline_rank=0):
    """Megatron's tensors on one rank of a layout with tensor and pipeline parallelism."""
    grid = Grid(tensor=tensor, pipeline=pipeline, tensor_rank=tensor_rank, pipeline_rank=pipeline_rank)
    return megatron_tensors(shape, ParallelSettings(tensor=tensor, pipeline=pipeline), grid)


@st.composite
def shapes(draw):
    """Models of every family whose sizes divide by 4."""
    family = draw(st.sampled_from(["llama", "qwen2", "qwen3"]))
    biases = family == "llama" and draw(st.booleans())
    heads = draw(st.sampled_from([4, 8]))
    changes = {
        "hidden_size": draw(st.sampled_from([6, 12])),
        "num_layers": draw(st.sampled_from([2, 4])),
        "num_heads": heads,
        "num_kv_heads": draw(st.sampled_from([size for size in (1, 2, 4, 8) if size <= heads])),
        "head_dim": draw(st.sampled_from([2, 6])),
        "ffn_size": draw(st.sampled_from([4, 20])),
        "vocab_size": draw(st.integers(1, 300)),
        "tied_embeddings": draw(st.booleans()),
    }
    if biases:
        changes |= {"qkv_bias": True, "attention_out_bias": True}
    return make_shape(family, **changes)


def random_checkpoint(shape, seed=0):
    """Every element of every tensor is different, so a misplaced one is seen."""
    tensors, total = {}, 0
    for name, dims in hf_tensors(shape).items():
        count = torch.Size(dims).numel()
        tensors[name] = torch.arange(total + 1, total + count + 1, dtype=torch.float64).reshape(dims)
        total += count
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).double() + 1
    return {name: order[tensor.long() - 1] for name, tensor in tensors.items()}


def slice_reader(checkpoint):
    """Reads boxes of the tensors in memory."""
    return lambda name, box: checkpoint[name][tuple(slice(start, stop) for start, stop in box)]


def padded(tensor, rows):
    return torch.cat([tensor, tensor.new_zeros(rows - tensor.shape[0], *tensor.shape[1:])])


def megatron_reference(shape, checkpoint, tensor, pipeline, tensor_rank, pipeline_rank):
    """Megatron's parameters of a rank: the fused tensors of the whole model, then plain chunks."""
    per_stage = shape.num_layers // pipeline
    rows = padded_vocab_size(shape.vocab_size, tensor)
    found = {}
    if pipeline_rank == 0:
        embedding = padded(checkpoint["model.embed_tokens.weight"], rows)
        found["embedding.word_embeddings.weight"] = embedding.chunk(tensor)[tensor_rank]
    for local in range(per_stage):
        hf = {
            name.removeprefix(f"model.layers.{pipeline_rank * per_stage + local}."): value
            for name, value in checkpoint.items()
            if name.startswith(f"model.layers.{pipeline_rank * per_stage + local}.")
        }
        layer = {
            "self_attention.linear_qkv.layer_norm_weight": hf["input_layernorm.weight"],
            "self_attention.linear_proj.weight": hf["self_attn.o_proj.weight"].chunk(tensor, 1)[tensor_rank],
            "mlp.linear_fc1.layer_norm_weight": hf["post_attention_layernorm.weight"],
            "mlp.linear_fc2.weight": hf["mlp.down_proj.weight"].chunk(tensor, 1)[tensor_rank],
            "mlp.linear_fc1.weight": torch.cat(
                [hf[f"mlp.{half}_proj.weight"].chunk(tensor)[tensor_rank] for half in ("gate", "up")]
            ),
        }
        for kind in ("weight", "bias"):
            if f"self_attn.q_proj.{kind}" not in hf:
                continue
            groups = [hf[f"self_attn.{part}_proj.{kind}"].chunk(shape.num_kv_heads) for part in "qkv"]
            fused = torch.cat([torch.cat(group) for group in zip(*groups, strict=True)])
            layer[f"self_attention.linear_qkv.{kind}"] = fused.chunk(tensor)[tensor_rank]
        for part in "qk":
            if f"self_attn.{part}_norm.weight" in hf:
                layer[f"self_attention.{part}_layernorm.weight"] = hf[f"self_attn.{part}_norm.weight"]
        if "self_attn.o_proj.bias" in hf:
            layer["self_attention.linear_proj.bias"] = hf["self_attn.o_proj.bias"]
        found |= {f"decoder.layers.{local}.{name}": value for name, value in layer.items()}
    if pipeline_rank == pipeline - 1:
        found["decoder.final_layernorm.weight"] = checkpoint["model.norm.weight"]
        if not shape.tied_embeddings or pipeline > 1:
            head = "model.embed_tokens.weight" if shape.tied_embeddings else "lm_head.weight"
            found["output_layer.weight"] = padded(checkpoint[head], rows).chunk(tensor)[tensor_rank]
    return found


def vllm_reference(shape, checkpoint, tensor, rank):
    """vLLM's parameters of a rank: key-value heads repeated to at least one per rank, then plain chunks."""
    rows = -(-shape.vocab_size // 64) * 64
    repeat = max(1, tensor // shape.num_kv_heads)
    found = {}
    for name, value in checkpoint.items():
        if ".k_proj." in name or ".v_proj." in name:
            heads = value.unflatten(0, (shape.num_kv_heads, shape.head_dim))
            value = heads.repeat_interleave(repeat, 0).flatten(0, 1)
        if "o_proj.weight" in name or "down_proj" in name:
            value = value.chunk(tensor, 1)[rank]
        elif "embed_tokens" in name or "lm_head" in name:
            value = padded(value, rows).chunk(tensor)[rank]
        elif "norm" not in name and "o_proj.bias" not in name:
            value = value.chunk(tensor)[rank]
        for fused, parts in (("qkv_proj", ("q_proj", "k_proj", "v_proj")), ("gate_up_proj", ("gate_proj", "up_proj"))):
            for part in parts:
                name = name.replace(f".{part}.", f".{fused}.")
        found[name] = torch.cat([found[name], value]) if name in found else value
    return found
