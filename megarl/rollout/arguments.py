"""From a run's configuration to vLLM's EngineArgs."""

from __future__ import annotations

import importlib
import os
from typing import Any

import torch
from vllm import ModelRegistry
from vllm.platforms import current_platform
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

from megarl.config.implied import Implied
from megarl.config.model_shape import FAMILIES, ModelShape
from megarl.config.schema import RunConfig
from megarl.errors import Refusal
from megarl.reshard.fp8_map import quantization_config

GIB = 1 << 30
#: By which PyTorch's allocator is told its settings: its name of old, and that of today.
ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
CPU_KV_CACHE_GIB = 0.25
#: Sizes that vLLM's CPU kernels for experts take; it pads the experts' own size, but not the model's.
CPU_EXPERT_MULTIPLE = 32


def engine_arguments(
    config: RunConfig, shape: ModelShape, *, load_weights: bool, record_routing: bool = False
) -> dict[str, Any]:
    """EngineArgs fields for a run that keeps `megarl.config.rules`.

    Raises `Refusal` for what this build of vLLM cannot do.
    """
    rollout = config.rollout
    length = Implied(config).longest_engine_sequence
    arguments: dict[str, Any] = {
        "model": config.model.path,
        # The model is what config.json says, whatever else lies in the folder: a params.json, or modules of a pooler.
        "config_format": "hf",
        # In FP8 or not, that is where the policy starts from, and says nothing of what the engine holds.
        "hf_overrides": {"quantization_config": None},
        "runner": "generate",
        "tensor_parallel_size": rollout.tensor,
        "enable_expert_parallel": rollout.expert_parallel,
        "dtype": {"fp32": "float32", "bf16": "bfloat16"}[config.engine_dtype],
        "max_model_len": length,
        "max_num_seqs": rollout.max_concurrent,
        "seed": config.seed % 2**31,
        # Weights that arrive by push are not read from files.
        "load_format": "auto" if load_weights else "dummy",
        "distributed_executor_backend": "external_launcher",
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        # Log-probs after temperature, top-p and top-k: those of the distribution the tokens were drawn from.
        "logprobs_mode": "processed_logprobs",
        "disable_log_stats": True,
    }
    if rollout.precision == "fp8":
        arguments |= _fp8_arguments(shape)
    arguments |= _gpu_arguments(config, shape) if torch.cuda.is_available() else _cpu_arguments(config, shape, length)
    arguments |= config.vllm
    if record_routing:
        arguments |= _routing_arguments(shape, arguments)
    return arguments


def _fp8_arguments(shape: ModelShape) -> dict[str, Any]:
    """A model as a checkpoint that was saved in FP8 blocks: vLLM keeps such weights as they were loaded.

    Experts by Triton's kernels, which do; vLLM takes FlashInfer's on Hopper with expert parallelism, which exchange the
    halves of a stack.
    """
    if not torch.cuda.is_available():
        # Its modules take seconds to import.
        from megarl.rollout import cpu_fp8

        cpu_fp8.register()
    experts = {"moe_backend": "triton"} if shape.is_moe and torch.cuda.is_available() else {}
    return {"hf_overrides": {"quantization_config": quantization_config(shape)}} | experts


def _routing_arguments(shape: ModelShape, arguments: dict[str, Any]) -> dict[str, Any]:
    """What it takes to record the experts of every token; see `megarl.rollout.routing`."""
    if not shape.is_moe:
        raise Refusal(
            f"recorded routing of a {shape.family} model",
            "needs a mixture of experts",
            "leave the routing of a dense model alone",
        )
    if torch.cuda.is_available():
        # With steps under way while the next is scheduled, the last one's record would come after a reset.
        return {"enable_return_routed_experts": True, "async_scheduling": False}
    if not arguments["enforce_eager"]:
        raise Refusal(
            "vllm.enforce_eager=false",
            "must be left on where routing is recorded on the CPU, by code that runs between the layers",
            "remove it, or do not record the routing",
        )
    return {}


def _cpu_arguments(config: RunConfig, shape: ModelShape, length: int) -> dict[str, Any]:
    if not current_platform.is_cpu():
        raise Refusal(
            "vLLM's build for GPUs on a machine without one",
            "makes no engine",
            "run where a GPU is, or install the CPU's packages (MEGARL_LOCK=cpu bash launch/setup.sh)",
        )
    sizes = CPUAttentionBackend.get_supported_head_sizes()
    if shape.head_dim not in sizes:
        raise Refusal(
            f"attention heads of {shape.head_dim} elements",
            f"vLLM's CPU backend has kernels for {', '.join(map(str, sizes))} alone",
            "use a model with one of these head sizes",
        )
    if shape.is_moe and shape.hidden_size % CPU_EXPERT_MULTIPLE:
        raise Refusal(
            f"hidden_size={shape.hidden_size} of a mixture of experts",
            f"must be a multiple of {CPU_EXPERT_MULTIPLE} for vLLM's CPU kernels",
            "use a model with such a size",
        )
    return {
        "enforce_eager": True,
        "worker_cls": "megarl.rollout.cpu_worker.Worker",
        # An explicit size together with eager mode lets vLLM skip its warm-up.
        "kv_cache_memory_bytes": int((config.rollout.kv_cache_gib or CPU_KV_CACHE_GIB) * GIB),
        # A seeded request whose prompt is cut by the token budget makes vLLM rewind the request's generator,
        # which CPU generators cannot do ("CPU Generator does not use offset"): never cut prompts.
        "enable_chunked_prefill": False,
        # Samples of a group share their prompt. vLLM's default of 128 tokens leaves most prompts of small models
        # uncached; 256 samples of 60-token prompts, 8 each: 2.0 s of processor time without cache and with blocks
        # of 128, 1.6 with blocks of 32; of 400-token prompts 6.6, 2.5 and 2.3.
        "enable_prefix_caching": True,
        "block_size": 32,
        "max_num_batched_tokens": max(length, 8192),
    }


def _gpu_arguments(config: RunConfig, shape: ModelShape) -> dict[str, Any]:
    for name in ALLOCATOR_VARIABLES:
        if "expandable_segments:True" in os.environ.get(name, ""):
            raise Refusal(
                f"{name} with expandable_segments:True",
                "vLLM's sleep mode cannot free memory held in expandable segments",
                "unset it",
            )
    gib = config.rollout.kv_cache_gib
    return {
        "enable_sleep_mode": True,
        "max_num_batched_tokens": Implied(config).batched_tokens,
        "gpu_memory_utilization": config.rollout.gpu_memory_fraction,
        "kv_cache_memory_bytes": None if gib is None else int(gib * GIB),
        # Chooses among kernels by what they take at this start.
        **({"enable_flashinfer_autotune": False} if config.deterministic else {}),
    }


def register_model_class(family: str) -> None:
    """Tell vLLM the model's class, which it would otherwise inspect in a subprocess that takes seconds to start.

    vLLM's modules have the names of Hugging Face's model types. Only the run's is imported: some take 0.5 s.
    """
    name = FAMILIES[family].architecture
    ModelRegistry.register_model(name, getattr(importlib.import_module(f"vllm.model_executor.models.{family}"), name))
