"""Which experts the tokens of a generation went through.

A record has one row for every token that the engine computed: the prompt and the response but for its last
token, whose successor nobody asked for. Where the keys and values of a prompt's beginning came from the prefix
cache, so does its routing: it belongs to those keys and values.

vLLM keeps the record ("auxiliary outputs"): its routers write their choices of a step into a buffer, a connector beside
the model runner takes them from there and keeps them by cached block, and a scheduler hands them out with the tokens.
Under the external launcher every rank of an engine has a scheduler, which asks its own worker; vLLM means one, and has
the first rank alone keep a record. Here every rank does. On the CPU, where vLLM's model runner has no connector, the
worker does what the one on a GPU does with it (`megarl.rollout.cpu_worker`).
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from torch import nn
from vllm.config import VllmConfig

from megarl.errors import MegarlError


def switch_on(config: VllmConfig) -> None:
    """Have engines of this configuration record their routing, on each of their ranks.

    A router sees all of a step's tokens on every rank: tensor parallelism cuts the experts, or deals them out.
    """
    from vllm.distributed.aux_output_connector import worker

    config.aux_output_config.enable_return_routed_experts = True
    # Asked for nothing else than whether to keep what was recorded.
    connector: Any = worker
    connector.get_tp_group = lambda: SimpleNamespace(is_first_rank=True)


class RoutingRecorder:
    """Reads the record of a worker's engine."""

    def __init__(self, worker: Any) -> None:
        self._layers = [runner.layer_id for runner in _sparse_layers(worker.get_model())]

    def experts_of(self, output: Any, tokens: int) -> np.ndarray:
        """int16 (tokens, sparse layers, experts per token) of a finished request, each token's experts in ascending
        order. Raises `MegarlError` for missing tokens."""
        found = output.outputs[0].routed_experts
        if found is None or len(found) != tokens:
            held = 0 if found is None else len(found)
            raise MegarlError(f"vLLM recorded the routing of {held} of {tokens} tokens of request {output.request_id}")
        return np.sort(found[:, self._layers].astype(np.int16), axis=-1)


def _sparse_layers(model: nn.Module) -> list[Any]:
    """vLLM's mixtures of experts in the order of the forward pass."""
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    return sorted((m for m in model.modules() if isinstance(m, MoERunner)), key=lambda layer: layer.layer_id)
