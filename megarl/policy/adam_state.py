"""The optimizers' state in checkpoints: every rank writes and reads what it owns, in the places of the model's tensors.

Megatron's distributed optimizer deals all parameters out to the data-parallel ranks, a flat range of one after the
other; fp32 weights and moments are the owner's alone. In the tensor that a checkpoint has of a parameter a flat range
is a few boxes. They go to disk and come back as they are: no rank ever holds another's, and as a checkpoint knows
nothing of owners it loads under any layout. Megatron's own format for that ("fully_reshardable") has the same tensors,
but gathers a whole shard before it is written and reads a whole shard on each rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

from megarl.reshard.boxes import extents, numel, of_range


@dataclass(frozen=True, slots=True)
class Owned:
    """What a distributed optimizer has of a parameter's elements [start, stop): flat tensors, by their kind."""

    optimizer: Any
    parameter: torch.nn.Parameter
    start: int
    stop: int
    tensors: Mapping[str, torch.Tensor]


def owned(optimizer: Any) -> list[Owned]:
    """This rank's part of the fp32 weights (`param`) and moments; `optimizer` is Megatron's chain of distributed ones.

    Parameters that were never updated get the state that their first step would start from.
    """
    found = []
    for distributed in optimizer.chained_optimizers:
        _allocate(distributed)
        for parameter in distributed.model_param_group_index_map:
            span = distributed._get_model_param_range_map(parameter)["param"]
            tensors = distributed._get_main_param_and_optimizer_states(parameter)
            # PyTorch's Adam counts steps per parameter.
            kept = {kind: tensor for kind, tensor in tensors.items() if kind != "step"}
            found.append(Owned(distributed, parameter, span.start, span.end, kept))
    return found


def boxes(parts: Sequence[Owned], of_model: Mapping[str, Any]) -> dict[int, dict[str, list[ShardedTensor]]]:
    """The parts as boxes of a checkpoint's tensors, views of theirs; by number and kind.

    `of_model`: where a checkpoint has the model's parameters. The keys are Megatron's, "optimizer.state.KIND." before
    the parameter's.
    """
    entries, _ = extract_sharded_tensors_and_factories(dict(of_model))
    places = {entry.data: entry for entry in nested_values(entries)}
    return {
        number: {
            kind: [
                box
                for first, whole in _stored(places[part.parameter])
                for box in _boxes(part, tensor, f"optimizer.state.{kind}", first, whole)
            ]
            for kind, tensor in part.tensors.items()
        }
        for number, part in enumerate(parts)
    }


@torch.no_grad()
def loaded(parts: Sequence[Owned], updates: int) -> None:
    """The parts' tensors were written, with what they were after that many updates."""
    for part in parts:
        # Where they are not the optimizer's own, since it keeps others in fewer bits.
        tensors = dict(part.tensors, step=None)
        part.optimizer._set_main_param_and_optimizer_states(part.parameter, tensors)
    for distributed in {id(part.optimizer): part.optimizer for part in parts}.values():
        for adam in _adams(distributed):
            _set_step(adam, updates)
        if isinstance(distributed.optimizer, HybridDeviceOptimizer):
            distributed.optimizer._sync_hdo_state_to_sub_optimizers()


def _stored(entry: Any) -> Iterator[tuple[int, Any]]:
    """The shards (Megatron's ShardedTensor) that a checkpoint has of a parameter, each with the place of its first
    element in the parameter: several where one parameter lies in several places, as gate and up projection do."""
    if not isinstance(entry, ShardedTensorFactory):
        yield 0, entry
        return
    # Where the elements go can be seen without any.
    for shard in nested_values(replace(entry, data=torch.empty(entry.data.shape, device="meta")).build()):
        assert shard.data.is_contiguous(), shard.key
        yield shard.data.storage_offset(), shard


def _boxes(part: Owned, tensor: torch.Tensor, prefix: str, first: int, shard: Any) -> Iterator[ShardedTensor]:
    """What `tensor` has of a shard that begins at the parameter's element `first`."""
    start, stop = max(part.start, first), min(part.stop, first + prod(shard.local_shape))
    at = start - part.start
    leading = (1,) * shard.prepend_axis_num
    for box in of_range(shard.local_shape, start - first, stop - first):
        shape = (*leading, *extents(box))
        inner = (*(0 for _ in leading), *(begin for begin, _ in box))
        yield ShardedTensor(
            key=f"{prefix}.{shard.key}",
            data=tensor.detach()[at : at + numel(box)].view(shape),
            dtype=tensor.dtype,
            local_shape=shape,
            global_shape=shard.global_shape,
            global_offset=tuple(map(sum, zip(shard.global_offset, inner, strict=True))),
            # No regular grid: other ranks have boxes of other shapes.
            axis_fragmentations=None,
            # Of the data-parallel ranks, each has others.
            replica_id=(*shard.replica_id[:2], 0),
            allow_shape_mismatch=shard.allow_shape_mismatch,
        )
        at += numel(box)


def _allocate(distributed: Any) -> None:
    for adam in _adams(distributed):
        for parameter in (one for group in adam.param_groups for one in group["params"]):
            if adam.state[parameter]:
                continue
            if isinstance(adam, torch.optim.Adam):
                adam.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
            else:
                adam.initialize_state(parameter, adam.store_param_remainders and parameter.dtype == torch.bfloat16)
    if isinstance(distributed.optimizer, HybridDeviceOptimizer):
        distributed.optimizer._sync_sub_optimizers_state_to_hdo()


def _set_step(adam: Any, updates: int) -> None:
    """PyTorch's Adam counts per parameter, Transformer Engine's per group."""
    for group in adam.param_groups:
        if isinstance(adam, torch.optim.Adam):
            for parameter in group["params"]:
                adam.state[parameter]["step"] = torch.tensor(float(updates))
        else:
            group["step"] = updates


def _adams(distributed: Any) -> list[Any]:
    """Those that update the parameters; several where Megatron updates some on the CPU."""
    inner = distributed.optimizer
    return inner.sub_optimizers if isinstance(inner, HybridDeviceOptimizer) else [inner]
