"""What this machine's GPUs do not allow, or the CPU where there is none: asked before any rank starts.

torch is imported only where NVIDIA's driver is, without which no process has a GPU: elsewhere `check` answers at once.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator

from megarl.config import fp8_rules, gpu_rules
from megarl.config.model_shape import read_model_shape
from megarl.config.schema import RunConfig
from megarl.errors import Refusal

#: Asks Transformer Engine for scales of blocks that are no powers of two.
FP32_SCALES = "NVTE_FP8_BLOCK_SCALING_FP32_SCALES"

#: The library of CUDA's driver.
_DRIVER = "libcuda.so.1"


def refusals(config: RunConfig) -> Iterator[Refusal]:
    """What `config` asks for and this process's GPUs, or their libraries, do not do. Starts CUDA where there is one."""
    capabilities = gpu_capabilities()
    if not capabilities:
        yield from fp8_rules.on_cpu(config)
        return
    shape = read_model_shape(config.model.path)
    for capability in sorted(capabilities):
        yield from gpu_rules.refusals(config, shape, capability)
    import torch

    from megarl.health.facts import installed

    engine = installed("transformer-engine", "transformer_engine")
    yield from fp8_rules.of_libraries(config, engine, torch.version.cuda, os.environ.get(FP32_SCALES) == "1")


def gpu_capabilities() -> set[tuple[int, int]]:
    """The compute capabilities of the GPUs that this process sees; none on a machine for the CPU."""
    try:
        ctypes.CDLL(_DRIVER)
    except OSError:
        return set()
    import torch

    from megarl.parallel import cpu_platform

    if not cpu_platform.has_cuda():
        return set()
    cpu_platform.order_queues()
    return {torch.cuda.get_device_capability(number) for number in range(torch.cuda.device_count())}
