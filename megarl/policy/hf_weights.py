"""Reads a Hugging Face checkpoint into this rank's shard, slice by slice, and draws random weights.

Only the boxes that the shard needs are read from the safetensors files.
"""

from __future__ import annotations

from pathlib import Path

import torch

from megarl.formats.huggingface import HfCheckpoint
from megarl.policy.policy import Policy
from megarl.reshard.boxes import Box
from megarl.reshard.copying import Reader, box_view, read_local
from megarl.reshard.weight_map import check_hf_shapes, hf_tensors, megatron_tensors


def load_hf_weights(policy: Policy, path: str | Path) -> None:
    """Fill the policy from the safetensors files in `path`.

    Raises `Refusal` where a file is missing or unreadable, and where a tensor is missing, superfluous or of another
    shape.
    """
    with HfCheckpoint(path) as checkpoint:
        check_hf_shapes(policy.shape, checkpoint.shapes, str(path))
        _fill(policy, checkpoint.read)


def draw_random_weights(policy: Policy, seed: int) -> None:
    """Fill the policy with normal weights of deviation 0.02 (norms 1, biases 0), the same under every layout; on a GPU
    they are drawn there, as a processor core takes a minute for seven billion, and are others."""
    shapes = hf_tensors(policy.shape)
    names = {name: number for number, name in enumerate(shapes)}
    generator = torch.Generator(policy.world.device)

    def read(name: str, box: Box) -> torch.Tensor:
        if name.endswith("norm.weight"):
            return torch.ones([stop - start for start, stop in box])
        if name.endswith("bias"):
            return torch.zeros([stop - start for start, stop in box])
        generator.manual_seed(seed * 1_000_003 + names[name])
        drawn = torch.randn(shapes[name], generator=generator, device=generator.device)
        return box_view(drawn * 0.02, box)

    _fill(policy, read)


def _fill(policy: Policy, reader: Reader) -> None:
    tensors = megatron_tensors(policy.shape, policy.config.parallel, policy.grid)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            parameter.copy_(read_local(tensors[name], reader, parameter.dtype))
    policy.weights_changed()
