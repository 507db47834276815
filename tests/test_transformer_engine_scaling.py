"""Delayed scaling's state of Transformer Engine's own layers in a checkpoint, without a GPU.

Needs Transformer Engine, so an environment of the GPU lock: see tests/test_gpu_lock.py. Its layers' weights are without
memory; their factors and histories are tensors of the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from config_case import DENSE, SPARSE, config_with
from megatron.core import dist_checkpointing
from torch._C._distributed_c10d import HashStore

from megarl.config import accelerations
from megarl.config.grid import chunks_of_stage
from megarl.config.model_shape import model_shape_from_hf
from megarl.formats import megatron
from megarl.parallel.fake_world import rank_of_fake_world
from megarl.policy.delayed_scaling import DelayedScaling
from megarl.policy.megatron_config import transformer_config
from megarl.policy.model import build_model

pytestmark = pytest.mark.skipif(
    not accelerations.has_extension(), reason="needs Transformer Engine: an environment of requirements/gpu.lock"
)

LENGTH = 3


def scaling_of(rank: int, model: dict[str, Any] = DENSE, processes: int = 1, **parallel: Any) -> DelayedScaling:
    """That of a rank of a world of so many processes."""
    parallel = {"processes": processes, **parallel}
    config = config_with(precision="fp8-delayed", fp8={"amax_history_len": LENGTH}, parallel=parallel)
    shape = model_shape_from_hf(model)
    with pytest.MonkeyPatch.context() as patch:
        with rank_of_fake_world(rank, processes, config.parallel) as grid:
            # By this megarl chooses its layers, and without it Transformer Engine makes none.
            patch.setattr("torch.cuda.is_available", lambda: True)
            patch.setattr("torch.cuda.current_device", lambda: 0)
            told = transformer_config(config, shape)
            chunks = build_model(told, shape, chunks_of_stage(shape.num_layers, config.parallel, grid.pipeline_rank))
        patch.setattr("torch.cuda.is_available", lambda: False)
        # What Transformer Engine asks of a GPU before it computes.
        patch.setattr("transformer_engine.pytorch.quantization.check_fp8_support", lambda: (True, ""))
        found = DelayedScaling(chunks, told, grid)
        # As each pass begins: what is there stays.
        again = DelayedScaling(chunks, told, grid)
        assert all(again.tensors[name] is tensor for name, tensor in found.tensors.items())
        return found


def fill(scaling: DelayedScaling, seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    for tensor in scaling.tensors.values():
        tensor.copy_(torch.rand_like(tensor))
    return {name: tensor.clone() for name, tensor in scaling.tensors.items()}


@contextmanager
def alone() -> Iterator[None]:
    """A real world of this process, in which checkpoints are written and read."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def test_every_linear_layer_has_a_state_from_the_beginning() -> None:
    found = scaling_of(0).tensors
    layers = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
    kinds = ("scaling_fwd.history", "scaling_fwd.factors", "scaling_bwd.history", "scaling_bwd.factors")
    assert {*found} == {f"decoder.layers.{n}.{layer}.{kind}" for n in range(4) for layer in layers for kind in kinds}
    assert all(megatron.is_scaling(name) for name in found)
    # Inputs, weights and outputs; outputs' and inputs' gradients.
    assert [tuple(found[f"decoder.layers.0.mlp.linear_fc2.{kind}"].shape) for kind in kinds] == [
        (LENGTH, 3), (3,), (LENGTH, 2), (2,),
    ]  # fmt: skip
    assert all(set(one.flatten().tolist()) == {float(name.endswith("factors"))} for name, one in found.items())


def test_ranks_have_places_of_their_own() -> None:
    rank = scaling_of(7, SPARSE, 8, tensor=2, pipeline=2, expert=2, expert_tensor=1)
    saved = rank.sharded()
    assert {int(name.split(".")[2]) for name in saved} == {2, 3}
    one = saved["decoder.layers.3.mlp.experts.linear_fc1.scaling_fwd.history"]
    # Two experts on a rank, in the second of two replicas, the second of two tensor-parallel ranks.
    assert one.global_shape == (2, 1, 2, LENGTH, 6)
    assert one.global_offset == (1, 0, 1, 0, 0)
    assert "decoder.layers.3.mlp.shared_experts.linear_fc2.scaling_bwd.factors" in saved


def test_it_is_saved_and_goes_on(tmp_path: Path) -> None:
    before, after, read = (scaling_of(0, SPARSE) for _ in range(3))
    wanted = fill(before, seed=1)
    fill(after, seed=2)
    after.begin_anew()
    assert {name: one.unique().tolist() for name, one in after.tensors.items()} == {
        name: [float(name.endswith("factors"))] for name in wanted
    }
    with alone():
        dist_checkpointing.save({"scaling.": before.sharded()}, str(tmp_path))
        stored = dist_checkpointing.load_tensors_metadata(str(tmp_path))
        # By these a checkpoint of another layout, or with histories of another length, is told.
        shapes = {name: tuple(one.global_shape) for name, one in stored.items()}
        assert shapes == {name: tuple(one.global_shape) for name, one in before.sharded().items()}
        found: Any = dist_checkpointing.load({"scaling.": read.sharded()}, str(tmp_path))
    after.load(found["scaling."])
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in after.tensors.items())


def test_reductions_see_what_was_loaded() -> None:
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager  # pyright: ignore[reportMissingImports]

    values = fill(scaling_of(0), seed=3)
    FP8GlobalStateManager.reset()
    scaling = scaling_of(0)
    scaling.load(values)
    buffers = FP8GlobalStateManager.global_amax_history_buffer, FP8GlobalStateManager.global_scale_buffer
    reduced = {one.data_ptr(): one for buffer in buffers for some in buffer.values() for one in some}
    assert len(reduced) == len(scaling.tensors)
    assert all(torch.equal(reduced[one.data_ptr()], values[name]) for name, one in scaling.tensors.items())
    rows = [one for some in FP8GlobalStateManager.global_amax_buffer.values() for one in some]
    assert {one.data_ptr() for one in rows} < {*reduced}
