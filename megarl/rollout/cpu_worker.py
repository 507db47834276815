"""vLLM's CPU worker, made fit to share its process with a trainer and its host with other runs.

vLLM names the shared memory of a tensor-parallel group after the address the processes met at. Under
the external launcher that is always `env://`, so two runs on one host would share one segment.

Importing the worker puts placeholders in the place of torch.cuda's streams, for the whole process. Their
`record_event` returns nothing, on which Megatron-core's expert dispatcher would wait.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from vllm.v1.worker.cpu import shm
from vllm.v1.worker.cpu_worker import CPUWorker


class _Stream(shm._StreamPlaceholder):
    """vLLM's placeholder for a stream, with events to wait for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.record_event = lambda *_: shm._EventPlaceholder()


def _complete_streams() -> None:
    cuda: Any = torch.cuda
    cuda.Stream = _Stream
    cuda.current_stream = lambda *_, **__: _Stream()


_complete_streams()


class Worker(CPUWorker):
    """`CPUWorker` whose group is named after the run's port.

    Ranks wait for each other by spinning on the shared memory, which needs a core for every process. With
    fewer cores the throughput is the same either way, but pauses of seconds were seen; there a name per rank
    makes vLLM use gloo instead.
    """

    def __init__(
        self, vllm_config: Any, local_rank: int, rank: int, distributed_init_method: str, is_driver_worker: bool = False
    ) -> None:
        name = f"megarl-{os.environ['MASTER_PORT']}"
        if len(os.sched_getaffinity(0)) < int(os.environ["WORLD_SIZE"]):
            name += f"-rank{rank}"
        # The default process group exists already, so the address serves as a name alone.
        super().__init__(vllm_config, local_rank, rank, f"env://:{name}", is_driver_worker)
