"""vLLM's CPU worker, made fit to share its process with a trainer and its host with other runs.

vLLM names the shared memory of a tensor-parallel group after the address the processes met at. Under
the external launcher that is always `env://`, so two runs on one host would share one segment.
"""

from __future__ import annotations

import os
import secrets
from typing import Any

import torch.distributed as dist
from vllm.v1.worker.cpu_worker import CPUWorker

from megarl.parallel import cpu_platform
from megarl.rollout import experts

# Importing vLLM's worker has put other stand-ins in the place of torch.cuda's streams.
cpu_platform.redirect_streams()
experts.number_locally()


class Worker(CPUWorker):
    """`CPUWorker` whose group has a name that no other run has, not even one that was killed and left its memory.

    Ranks wait for each other by spinning on the shared memory, which needs a core for every process. With
    fewer cores the throughput is the same either way, but pauses of seconds were seen; there a name per rank
    makes vLLM use gloo instead.
    """

    def __init__(
        self, vllm_config: Any, local_rank: int, rank: int, distributed_init_method: str, is_driver_worker: bool = False
    ) -> None:
        token = [secrets.token_hex(4)]
        dist.broadcast_object_list(token)
        name = f"megarl-{token[0]}"
        if len(os.sched_getaffinity(0)) < dist.get_world_size():
            name += f"-rank{rank}"
        # The default process group exists already: the address serves as a name alone.
        super().__init__(vllm_config, local_rank, rank, f"env://:{name}", is_driver_worker)
