"""A rank of a world that is not there: PyTorch's fake process group, and tensors without memory.

One process takes the place of any rank of any world, so that Megatron builds what that rank would hold. Nothing
communicates, and nothing of it outlives the block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from megarl.config.grid import Grid
from megarl.config.sections import ParallelSettings
from megarl.errors import MegarlError
from megarl.parallel import cpu_platform
from megarl.parallel.groups import dissolve_grid, form_grid


class _OnMeta(TorchFunctionMode):
    """Makes every tensor on the meta device, also where a device is named, as Megatron does."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        if "device" in given:
            given["device"] = "meta"
        return func(*args, **given)


@contextmanager
def rank_of_fake_world(rank: int, world: int, parallel: ParallelSettings) -> Iterator[Grid]:
    """Stand at `rank` of `world` ranks inside the block, Megatron's groups formed, new tensors without memory.

    Yields the rank's place. Raises `MegarlError` where this process belongs to a real world.
    """
    if dist.is_initialized():
        raise MegarlError("a rehearsal needs a process that has not joined a world: run it in one of its own")
    cpu_platform.activate()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        with torch.random.fork_rng(devices=[]):
            grid = form_grid(parallel, seed=0, backend="fake")
            with torch.device("meta"), _OnMeta():
                yield grid
    finally:
        dissolve_grid()
        dist.destroy_process_group()
