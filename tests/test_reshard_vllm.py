"""vLLM's own model classes and weight loaders against `vllm_tensors`, bitwise, in two tensor-parallel processes."""

import os
import tempfile
from typing import Any

import parity
import torch
import transformers
from reshard_reference import slice_reader

from megarl.config.model_shape import model_shape_from_hf
from megarl.reshard.copying import read_local
from megarl.reshard.weight_map import hf_tensors, vllm_tensors

# kv heads: more than ranks, or one that both ranks repeat; vocabularies with padding.
MODELS = {
    "llama": {"num_key_value_heads": 2, "vocab_size": 50, "head_dim": 32},
    "llama with biases": {"num_key_value_heads": 1, "vocab_size": 129, "attention_bias": True},
    "qwen2": {"num_key_value_heads": 1, "vocab_size": 130, "tie_word_embeddings": False},
    "qwen2 tied": {"num_key_value_heads": 4, "vocab_size": 64, "tie_word_embeddings": True},
    "qwen3": {"num_key_value_heads": 2, "vocab_size": 200, "head_dim": 32, "tie_word_embeddings": False},
}
CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def hf_config(name):
    family = name.split()[0]
    return transformers.AutoConfig.for_model(
        family,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        architectures=[CLASSES[family]],
        **MODELS[name],
    )


def compare(name, rank, world):
    """Build vLLM's model, let it load a random checkpoint, and list what differs from our layout."""
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.models import ModelRegistry

    from megarl.rollout.arguments import register_model_class

    config = hf_config(name)
    shape = model_shape_from_hf(config.to_dict())
    register_model_class(shape.family)
    random = torch.Generator().manual_seed(1)
    checkpoint = {key: torch.randn(dims, generator=random) for key, dims in hf_tensors(shape).items()}
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        arguments = EngineArgs(
            model=folder,
            skip_tokenizer_init=True,
            enforce_eager=True,
            dtype="float32",
            tensor_parallel_size=world,
            distributed_executor_backend="external_launcher",
        )
        vllm_config = arguments.create_engine_config()
    with set_current_vllm_config(vllm_config):
        start_groups(rank, world)
        model_class, _ = ModelRegistry.resolve_model_cls([CLASSES[shape.family]], vllm_config.model_config)
        model: Any = model_class(vllm_config=vllm_config)
        for parameter in model.parameters():
            parameter.data.fill_(torch.nan)
        model.load_weights(iter(checkpoint.items()))
    layout = vllm_tensors(shape, tensor=world, tensor_rank=rank)
    loaded = dict(model.named_parameters())
    faults = [f"{key}: only on one side" for key in layout.keys() ^ loaded.keys()]
    for key in layout.keys() & loaded.keys():
        if not torch.equal(read_local(layout[key], slice_reader(checkpoint)), loaded[key].data):
            faults.append(f"{key}: {layout[key].shape} differs from {tuple(loaded[key].shape)}")
    return faults


def start_groups(rank, world):
    """vLLM's process groups, once per process."""
    from vllm.distributed import init_distributed_environment, initialize_model_parallel, model_parallel_is_initialized

    if not model_parallel_is_initialized():
        init_distributed_environment(world, rank, "env://", rank, "gloo")
        initialize_model_parallel(world)


def compare_all(world):
    """What differs, by model. A scenario of `run_world`."""
    # vLLM's CPU communicator names its shared memory by this.
    os.environ["VLLM_DIST_IDENT"] = f"{os.environ['MASTER_PORT']}-layouts"
    return {name: compare(name, world.rank, world.size) for name in MODELS}


def test_vllm_loads_what_the_layout_says():
    found = parity.run_world("test_reshard_vllm", "compare_all", 2)
    assert found == [{name: [] for name in MODELS}] * 2
