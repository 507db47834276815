"""Megatron's groups: what they communicate by, and how many descriptors that takes."""

from __future__ import annotations

import os
from typing import Any

import parity

#: Of four ranks: groups of all, of two and of one.
LAYOUT: dict[str, Any] = {"processes": 4, "tensor": 2}


def descriptors(world: Any) -> dict[str, Any]:
    """Of groups that take after the default one, and of groups over a backend that has no connections: how many
    descriptors they take, and the sizes of the groups by their backends. A scenario of `run_world`."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    from megarl.config.sections import ParallelSettings
    from megarl.parallel.groups import dissolve_grid, form_grid

    found = {}
    for backend in ("fake", None):
        before = len(os.listdir("/proc/self/fd"))
        form_grid(ParallelSettings(**LAYOUT), 0, backend=backend)
        formed: Any = parallel_state._global_process_group_list
        groups = [group for group in formed if group is not None]
        sizes: dict[str, list[int]] = {}
        for group in groups:
            sizes.setdefault(dist.get_backend(group), []).append(dist.get_world_size(group))
        found[backend or "default"] = len(os.listdir("/proc/self/fd")) - before, sizes
        dissolve_grid()
    return found


def test_groups_for_the_device_have_no_connections_between_hosts():
    """Each group over gloo takes a descriptor for every other rank of it, and some of its own."""
    for found in parity.run_world(__name__, "descriptors", 4):
        alone, sizes = found["fake"]
        whole, default = found["default"]
        assert sizes.keys() == {"fake"} and default.keys() == {"gloo"}
        assert sorted(sizes["fake"]) == sorted(default["gloo"])
        peers = sum(size - 1 for size in sizes["fake"])
        # Seen: 99 more for 20 groups with 19 connections, 4 of each group's own.
        assert peers > 10 and whole - alone >= peers + 2 * len(sizes["fake"])
