"""vLLM's CPU worker, made fit to share its process with a trainer and its host with other runs, and to record routing.

vLLM names the shared memory of a tensor-parallel group after the address the processes met at. Under
the external launcher that is always `env://`, so two runs on one host would share one segment.
"""

from __future__ import annotations

import os
import secrets
from types import SimpleNamespace
from typing import Any

import numpy as np
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
        self._routing: Any = None

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        """See vLLM; from here on the routers' choices are recorded, where that is asked for."""
        super().initialize_from_config(kv_cache_config)
        if self.vllm_config.aux_output_config.enabled:
            from vllm.distributed.aux_output_connector.worker import AuxOutputWorkerConnector

            self._routing = AuxOutputWorkerConnector(
                vllm_config=self.vllm_config, model=self.model_runner.get_model(), kv_cache_config=kv_cache_config
            )

    def execute_model(self, scheduler_output: Any) -> Any:
        """See vLLM."""
        if self._routing is not None:
            self._routing.begin_step(scheduler_output.aux_output_connector_metadata)
        return super().execute_model(scheduler_output)

    def sample_tokens(self, grammar_output: Any) -> Any:
        """See vLLM; with the experts of the step's tokens, as vLLM's model runner on a GPU gives them."""
        if self._routing is None:
            return super().sample_tokens(grammar_output)
        batch = self.model_runner.input_batch
        step: Any = SimpleNamespace(
            req_ids=batch.req_ids,
            query_start_loc_np=self.model_runner.query_start_loc.np,
            num_computed_tokens_np=batch.num_computed_tokens_cpu[: batch.num_reqs],
        )
        experts = self._routing.prepare_output(step)
        output: Any = super().sample_tokens(grammar_output)
        if experts is not None:
            sampled = np.array([len(tokens) for tokens in output.sampled_token_ids])
            experts.enqueue_cpu_copy(sampled, np.zeros_like(sampled))
            output.aux_output_connector_output = experts.process_output()
        return output

    def shutdown(self) -> None:
        """See vLLM."""
        if self._routing is not None:
            self._routing.close()
        super().shutdown()
