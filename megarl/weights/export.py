"""Writes the policy as a Hugging Face checkpoint: every rank writes whole tensors of its own share."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from megarl.formats.companions import copy_companions
from megarl.formats.huggingface import DTYPE_NAMES, FILE_BYTES, PRECISIONS, HfFiles
from megarl.parallel.whole_folder import whole_folder
from megarl.policy.policy import Policy
from megarl.reshard.boxes import whole
from megarl.reshard.fp8_map import quantised_weights, quantization_config
from megarl.reshard.model_layouts import checkpoint_layout, lanes, policy_layout
from megarl.reshard.plan import make_plan
from megarl.reshard.weight_map import hf_tensors
from megarl.reshard.wire import all_in
from megarl.weights.source import PolicyWeights, WeightSource
from megarl.weights.transfer import Mover

#: What a rank sends and receives together at a time.
BUCKET_BYTES = 256 << 20


class _HostTensors:
    """Collects whole checkpoint tensors in host memory."""

    def __init__(self, dtype: torch.dtype, shapes: dict[str, tuple[int, ...]]) -> None:
        self.tensors = {name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()}

    def buffer(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def complete(self, name: str) -> None:
        pass


def export_hf(
    policy: Policy,
    directory: Path,
    original: Path,
    source: WeightSource | None = None,
    precision: Literal["fp32", "bf16", "fp8"] | None = None,
) -> None:
    """Write the policy's weights, or what `source` makes of them, to `directory` as a checkpoint in `precision`, by
    default the policy's, with the companions of `original`.

    fp8: linear layers are quantised (`megarl.config.quantisation`), the rest stays in the policy's type.

    The directory appears under its name only when it is complete.
    """
    world = policy.world
    dtype = policy.params_dtype
    targets = checkpoint_layout(policy.shape, range(world.size))
    plan = make_plan(
        world.rank,
        policy_layout(policy.shape, policy.config.parallel, world.size),
        targets,
        node_of_rank=world.node_of_rank,
        lane_of_rank=lanes(policy.config.parallel, world.size),
        bucket_bytes=BUCKET_BYTES,
        wire=all_in(policy.config.params_dtype),
    )
    shapes = hf_tensors(policy.shape)
    mine = _HostTensors(
        dtype, {name: shape for name, shape in shapes.items() if world.rank in targets[name][0].split.of_rank}
    )
    mover = Mover(
        plan,
        device=world.device,
        time_limit=policy.config.weights.time_limit,
        computed={name: name for name in policy.adapted},
        occasion="export",
    )
    # With further models that train, the policy may be away.
    policy.onload_weights()
    mover.run(source or PolicyWeights(policy), mine)
    written, quantised = PRECISIONS.get(precision or "", dtype), precision == "fp8"
    files = HfFiles(shapes, written, FILE_BYTES, quantised=quantised_weights(policy.shape) if quantised else ())
    with whole_folder(directory, files.create) as partial:
        for name, tensor in mine.tensors.items():
            files.write(partial, name, whole(tensor.shape), tensor)
        files.sync(partial, mine.tensors)
        if world.is_first:
            format_of_weights = quantization_config(policy.shape) if quantised else None
            copy_companions(original, partial, DTYPE_NAMES[written], format_of_weights)
