"""Network namespaces that stand for hosts on one switch; made where that is permitted, and taken down surely."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


class Hosts:
    """Namespaces `names[i]` with address `addresses[i]` on interface eth0."""

    def __init__(self, number: int) -> None:
        self._switch = f"megarl-{os.getpid()}-switch"
        self.names = [f"megarl-{os.getpid()}-{host}" for host in range(number)]
        self.addresses = [f"10.77.0.{host + 1}" for host in range(number)]

    def make(self) -> None:
        for name in (self._switch, *self.names):
            run("ip", "netns", "add", name)
        run("ip", "-n", self._switch, "link", "add", "switch", "type", "bridge")
        run("ip", "-n", self._switch, "link", "set", "switch", "up")
        for host, (name, address) in enumerate(zip(self.names, self.addresses, strict=True)):
            pair = ("type", "veth", "peer", "name", f"port{host}", "netns", self._switch)
            run("ip", "-n", name, "link", "add", "eth0", *pair)
            run("ip", "-n", self._switch, "link", "set", f"port{host}", "master", "switch", "up")
            run("ip", "-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            for interface in ("eth0", "lo"):
                run("ip", "-n", name, "link", "set", interface, "up")

    def slow_down(self, host: int, rate: str, *, inward: bool = False) -> None:
        """Bound what leaves a host, or what comes to it, to a rate such as 50mbit."""
        name, interface = (self._switch, f"port{host}") if inward else (self.names[host], "eth0")
        shape = ("root", "tbf", "rate", rate, "burst", "32kb", "latency", "50ms")
        run("tc", "-n", name, "qdisc", "add", "dev", interface, *shape)

    def remove(self) -> None:
        for name in (self._switch, *self.names):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


@contextmanager
def hosts_apart(number: int) -> Iterator[Hosts]:
    """That many hosts; the test is skipped, with the reason, where they cannot be made."""
    hosts = Hosts(number)
    try:
        try:
            hosts.make()
        except (OSError, subprocess.CalledProcessError) as error:
            reason = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else error
            pytest.skip(f"no network namespaces here: {reason}")
        yield hosts
    finally:
        hosts.remove()


def move_to(name: str) -> None:
    """Put this process, which must have no other threads, on that host."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(Path("/run/netns") / name) as namespace:
        if libc.setns(namespace.fileno(), 0) != 0:
            raise OSError(ctypes.get_errno(), f"setns to {name}")
