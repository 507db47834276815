"""NVIDIA's libraries as they are installed, told by their compiled modules; nothing is imported. Torch-free."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from shutil import which

from megarl.errors import Refusal

#: Transformer Engine's extension for PyTorch, built apart from its Python package.
EXTENSION = "transformer_engine_torch"
LACKS_EXTENSION = f"lacks its extension for PyTorch, {EXTENSION}, without which Megatron-core cannot be imported"
BUILD_EXTENSION = "run launch/setup.sh with MEGARL_LOCK=gpu, which builds it, or uninstall Transformer Engine"


def refusals() -> Iterator[Refusal]:
    """What is installed by half: Megatron-core takes what it finds, whether or not there is a GPU."""
    if has_transformer_engine() and not has_extension():
        yield Refusal("Transformer Engine", LACKS_EXTENSION, BUILD_EXTENSION)


def has_transformer_engine() -> bool:
    """Whether its Python package is there."""
    return find_spec("transformer_engine") is not None


def has_extension() -> bool:
    """Whether Transformer Engine finds its extension, where it looks for it: beside its package and in it."""
    spec = find_spec("transformer_engine")
    if spec is None or spec.origin is None:
        return False
    package = Path(spec.origin).parent
    roots = {package.parent, Path(sysconfig.get_paths()["purelib"])}
    folders = [root / below for root in roots for below in (".", package.name, f"{package.name}/wheel_lib")]
    return any(next(folder.glob(f"{EXTENSION}*.so"), None) is not None for folder in folders)


def nvcc() -> str | None:
    """CUDA's compiler where vLLM and FlashInfer look for it: of CUDA_HOME, in the PATH, of /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return which(f"{home}/bin/nvcc")
    return which("nvcc") or which("/usr/local/cuda/bin/nvcc")


def wheels_toolkit() -> Path | None:
    """The folder of NVIDIA's wheels that serves as CUDA_HOME, with a compiler; None where they are not installed."""
    folder = Path(sysconfig.get_paths()["purelib"], "nvidia", "cu13")
    return folder if (folder / "bin" / "nvcc").is_file() else None


def has_apex() -> bool:
    """Whether NVIDIA's apex is there with its kernels; the package of that name on the Python index is another."""
    return find_spec("apex") is not None and find_spec("amp_C") is not None
