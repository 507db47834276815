"""Places that faults need: a small disk, and two hosts with a network of their own. Made where that is permitted."""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_CLONE_NEWUTS, _CLONE_NEWNET = 0x04000000, 0x40000000


class NotPermitted(Exception):
    """A place cannot be made here; says why."""


@contextmanager
def small_disk(folder: Path, mebibytes: int) -> Iterator[Path]:
    """A file system of that size at `folder`, in memory."""
    folder.mkdir(parents=True, exist_ok=True)
    _run("mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(folder))
    try:
        yield folder
    finally:
        # Also where a process that was killed has not let go of it yet.
        subprocess.run(["umount", "--lazy", str(folder)], check=False, capture_output=True)


class Hosts:
    """Two network namespaces with a cable between them: interface eth0, and nothing else but the loopback."""

    def __init__(self) -> None:
        self.names = [f"megarl-faults-{os.getpid()}-{host}" for host in range(2)]
        self.addresses = ["10.78.0.1", "10.78.0.2"]

    def make(self) -> None:
        for name in self.names:
            _run("ip", "netns", "add", name)
        first, second = self.names
        _run("ip", "-n", first, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", second)
        for name, address in zip(self.names, self.addresses, strict=True):
            _run("ip", "-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            for interface in ("eth0", "lo"):
                _run("ip", "-n", name, "link", "set", interface, "up")

    def remove(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)

    def enter(self, host: int) -> None:
        """Put this process on that host."""
        libc = ctypes.CDLL(None, use_errno=True)
        with open(Path("/run/netns") / self.names[host], encoding="utf-8") as namespace:
            if libc.setns(namespace.fileno(), _CLONE_NEWNET) != 0 or libc.unshare(_CLONE_NEWUTS) != 0:
                raise OSError(ctypes.get_errno(), f"cannot enter {self.names[host]}")
        socket.sethostname(f"host{host}")


@contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Two hosts, taken down afterwards."""
    hosts = Hosts()
    try:
        hosts.make()
        yield hosts
    finally:
        hosts.remove()


def why_no_disk(folder: Path) -> str | None:
    """Why there can be no small disk; None where there can."""
    try:
        with small_disk(folder, 1):
            return None
    except NotPermitted as error:
        return str(error)


def why_no_hosts() -> str | None:
    """Why there can be no hosts apart; None where there can."""
    try:
        with two_hosts():
            return None
    except NotPermitted as error:
        return str(error)


def _run(*command: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, encoding="utf-8", errors="replace")
    except (OSError, subprocess.CalledProcessError) as error:
        said = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else error
        raise NotPermitted(f"{' '.join(command[:3])}: {said}") from None
