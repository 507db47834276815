"""Processes of this host, told apart from later ones with the same number."""

from __future__ import annotations

from pathlib import Path


def identity(pid: int) -> str | None:
    """When a living process of this host began, in words of the kernel's; None where it is gone (or a zombie)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else f"{boot}/{fields[19]}"
