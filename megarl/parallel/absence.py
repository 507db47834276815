"""Which rank is missing when a wait fails: what the ranks that still live tell each other through the store."""

from __future__ import annotations

import time
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

#: Seconds that ranks whose waits ran out give each other to say so.
GRACE_SECONDS = 10.0

#: Seconds after which a rank whose connection broke has not merely run out of time.
BREAK_SECONDS = 1.0


def meet(occasion: str, time_limit: float) -> None:
    """Wait until every rank has come here. Raises `RuntimeError` after `time_limit` seconds.

    `occasion` names the meeting, the same on all ranks, and no other of the run.
    """
    store = dist.distributed_c10d._get_default_store()
    if store.add(f"megarl/{occasion}/come", 1) == dist.get_world_size():
        store.set(f"megarl/{occasion}/all", "")
    store.wait([f"megarl/{occasion}/all"], timedelta(seconds=time_limit))


def find_absent(
    occasion: str, peer: int | None, *, gone: bool, grace: float = GRACE_SECONDS
) -> tuple[bool, tuple[int, ...]]:
    """Whether a connection broke, and the ranks that a failed wait is due to; `peer` is whom this rank waited for.

    `gone`: the own connection broke, else the time ran out. The first rank that sees another's connection break says
    whose it was, so that its own end is not taken for the cause by the rest. A rank whose wait ran out says so too, and
    those that do not are the ones waited for; gloo then breaks its connections, which does not mean that it is gone.
    `occasion` is as in `meet`. Where the store is gone too, all that is known is `peer`.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    known = () if peer is None else (peer,)
    try:
        store = dist.distributed_c10d._get_default_store()
        if gone and peer is not None and not _said(store, _waits(occasion, peer), BREAK_SECONDS):
            return True, (int(store.compare_set(_gone(occasion), "", str(peer))),)
        store.set(_waits(occasion, rank), "")
        silent = [other for other in range(world) if other != rank]
        until = time.monotonic() + grace
        while silent and time.monotonic() < until:
            if store.check([_gone(occasion)]):
                return True, (int(store.get(_gone(occasion))),)
            time.sleep(0.05)
            silent = [other for other in silent if not store.check([_waits(occasion, other)])]
        return False, tuple(silent) or known
    except RuntimeError:
        return gone, known


def _said(store: Store, key: str, seconds: float) -> bool:
    """Whether the key is in the store within so many seconds."""
    until = time.monotonic() + seconds
    while not store.check([key]):
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def _waits(occasion: str, rank: int) -> str:
    return f"megarl/{occasion}/waits/{rank}"


def _gone(occasion: str) -> str:
    return f"megarl/{occasion}/gone"
