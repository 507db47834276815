"""vLLM's CPU worker with a rendezvous name of its own for the tensor-parallel collectives.

vLLM names the shared memory of a tensor-parallel group after the address the processes met at. Under
the external launcher that is always `env://`, so two runs on one host would share one segment.
"""

from __future__ import annotations

import os
from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker

#: Set by `megarl.rollout.engine`: whether collectives may spin in shared memory; else they go through gloo.
SHARED_MEMORY_VARIABLE = "MEGARL_ENGINE_SHARED_MEMORY"


class Worker(CPUWorker):
    """`CPUWorker` whose group name holds the run's port; a name per rank makes vLLM fall back to gloo."""

    def __init__(
        self, vllm_config: Any, local_rank: int, rank: int, distributed_init_method: str, is_driver_worker: bool = False
    ) -> None:
        name = f"megarl-{os.environ['MASTER_PORT']}"
        if os.environ.get(SHARED_MEMORY_VARIABLE) != "1":
            name += f"-rank{rank}"
        # The default process group exists already, so the method's only use is its name.
        super().__init__(vllm_config, local_rank, rank, f"env://:{name}", is_driver_worker)
