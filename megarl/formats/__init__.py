"""Checkpoints on disk: Hugging Face's and Megatron's files, read and written piece by piece."""
