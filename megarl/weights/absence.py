"""Which rank is missing when a wait fails: what the ranks that still live tell each other through the store."""

from __future__ import annotations

import time

import torch.distributed as dist

#: Seconds that ranks whose waits ran out give each other to say so.
GRACE_SECONDS = 10.0


def find_absent(occasion: str, peer: int, *, gone: bool, grace: float = GRACE_SECONDS) -> tuple[int, ...]:
    """The ranks that a failed wait is due to; `peer` is whom this rank waited for.

    `gone`: the connection broke, else the time ran out. The first rank that sees another's connection break says whose
    it was, so that its own end is not taken for the cause by the rest. Where time ran out, every rank that waited says
    so, and those that did not are the ones waited for. `occasion` names this wait, the same on all ranks. Falls back to
    `peer` where the store is gone with its rank.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    try:
        store = dist.distributed_c10d._get_default_store()
        if gone:
            return (int(store.compare_set(f"megarl/{occasion}/gone", "", str(peer))),)
        store.set(f"megarl/{occasion}/waits/{rank}", "")
        silent = tuple(other for other in range(world) if other != rank)
        until = time.monotonic() + grace
        while silent and time.monotonic() < until:
            time.sleep(0.05)
            silent = tuple(other for other in silent if not store.check([f"megarl/{occasion}/waits/{other}"]))
        return silent or (peer,)
    except RuntimeError:
        return (peer,)
