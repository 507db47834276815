"""Ports for what a test starts."""

from __future__ import annotations

import itertools
import random
import socket

#: Below those that the kernel gives to connections, and above those of Slurm's jobs: a port stays free until what it is
#: for has started, whatever other tests open meanwhile.
_RANGE = range(24_000, 32_000)


def free_port() -> int:
    """A port that nobody uses now, on any address."""
    return free_ports(1)[0]


def free_ports(count: int) -> list[int]:
    """Ports that nobody uses now, all different."""
    # Not `random`'s own generator, which tests seed.
    drawn = random.SystemRandom().sample(_RANGE, 100 + count)
    return list(itertools.islice(filter(_is_free, drawn), count))


def _is_free(port: int) -> bool:
    with socket.socket() as listener:
        try:
            listener.bind(("", port))
        except OSError:
            return False
    return True
