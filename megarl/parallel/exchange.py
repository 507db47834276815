"""Small exchanges between ranks: who knows what, and arrays sent to where they are needed.

All of it travels as CPU tensors over gloo, also where the weights travel over NCCL.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist

from megarl.errors import MegarlError

T = TypeVar("T")


def gather_all(value: T) -> list[T]:
    """Every rank's value, in rank order, on every rank. For small picklable values."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def anywhere(fact: bool) -> bool:
    """Whether it holds on any rank; the same on all. Collective."""
    found = torch.tensor([fact], dtype=torch.int8)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return bool(found.item())


def gather_to_first(value: T) -> list[T]:
    """Every rank's value, in rank order, on rank 0; nothing on the others. For picklable values that only it needs."""
    found: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, found, dst=0)
    return found or []


def from_first(value: T) -> T:
    """Rank 0's value on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def first_decides(action: Callable[[], T]) -> T:
    """What `action` returns on rank 0, the only one that calls it; its `MegarlError` is raised on every rank."""
    given: T | None = None
    refused: MegarlError | None = None
    if dist.get_rank() == 0:
        try:
            given = action()
        except MegarlError as error:
            refused = error
    given, refused = from_first((given, refused))
    if refused is not None:
        raise refused
    return cast(T, given)


def send_arrays(outgoing: Sequence[np.ndarray], incoming_sizes: Sequence[int]) -> list[np.ndarray]:
    """Send `outgoing[r]` (int32, flat) to each rank r; returns what each rank sent here.

    The receiver must know the sizes: `incoming_sizes[r]` elements come from rank r.
    """
    sizes = [len(part) for part in outgoing]
    payload = torch.from_numpy(np.concatenate([np.asarray(part, np.int32) for part in outgoing]))
    received = torch.empty(sum(incoming_sizes), dtype=torch.int32)
    dist.all_to_all_single(received, payload, list(incoming_sizes), sizes)
    return [part.numpy() for part in received.split(list(incoming_sizes))]
