"""megarl: reinforcement learning of language models on Megatron-core policies and vLLM engines."""

__version__ = "0.2.0"
