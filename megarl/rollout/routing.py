"""Which experts the tokens of a generation went through.

A record has one row for every token that the engine computed: the prompt and the response but for its last
token, whose successor nobody asked for. Where the keys and values of a prompt's beginning came from the prefix
cache, so does its routing: it belongs to those keys and values.

On a GPU vLLM keeps the record itself. On the CPU it does not (vLLM 0.32: "AuxOutput Connector requires Model
Runner V2", which needs Triton), so the routers' choices are written into a table with a row for every slot of
the KV cache, and a finished response is looked up by the blocks it holds.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import nn
from vllm.forward_context import get_forward_context

from megarl.errors import MegarlError, Refusal


class RoutingRecorder(Protocol):
    """What gives the routing of a finished request."""

    def experts_of(self, request_id: str, output: Any, tokens: int) -> np.ndarray:
        """int16 (tokens, sparse layers, experts per token) of the request that vLLM calls `request_id`, each token's
        experts in ascending order. To be asked before vLLM's next step. Raises `MegarlError` for missing tokens."""
        ...


class VllmRecorder:
    """Reads vLLM's own record, for engines made with `enable_return_routed_experts`."""

    def __init__(self, worker: Any) -> None:
        self._layers = [runner.layer_id for runner in _sparse_layers(worker.get_model())]

    def experts_of(self, request_id: str, output: Any, tokens: int) -> np.ndarray:
        """See `RoutingRecorder`."""
        found = output.outputs[0].routed_experts
        if found is None or len(found) != tokens:
            held = 0 if found is None else len(found)
            raise MegarlError(f"vLLM recorded the routing of {held} of {tokens} tokens of request {request_id}")
        return np.sort(found[:, self._layers].astype(np.int16), axis=-1)


class SlotRecorder:
    """Records the choices of the routers of a worker's model, by KV cache slot.

    Raises `Refusal` for a model whose layers keep their keys and values in different blocks.
    """

    def __init__(self, worker: Any) -> None:
        runner = worker.model_runner
        cache = runner.kv_cache_config
        if len(cache.kv_cache_groups) != 1:
            raise Refusal(
                f"{len(cache.kv_cache_groups)} groups of KV cache blocks",
                "routing is recorded for models whose layers all share one",
                "use a model with one kind of attention, or do not record the routing",
            )
        self._requests: dict[str, Any] = runner.requests
        self._block_size: int = cache.kv_cache_groups[0].kv_cache_spec.block_size
        layers = _sparse_layers(worker.get_model())
        # Padding has slot -1: the row behind the last slot.
        shape = (cache.num_blocks * self._block_size + 1, len(layers), layers[0].moe_config.experts_per_token)
        self._experts = np.full(shape, -1, np.int16)
        for place, layer in enumerate(layers):
            layer.router.set_capture_fn(partial(self._note, place))

    def _note(self, place: int, experts: torch.Tensor) -> None:
        metadata = cast("Any", get_forward_context().attn_metadata)
        if not metadata:
            # A run without requests, to warm up.
            return
        # One entry per attention layer; all layers share the slots.
        slots = next(iter(metadata.values())).slot_mapping.numpy()
        self._experts[slots, place] = experts[: len(slots)].numpy()

    def experts_of(self, request_id: str, output: Any, tokens: int) -> np.ndarray:
        """See `RoutingRecorder`."""
        del output
        # The worker forgets a finished request at the next step.
        blocks = np.array(self._requests[request_id].block_ids[0])
        slots = (blocks[:, None] * self._block_size + np.arange(self._block_size)).reshape(-1)[:tokens]
        found = np.sort(self._experts[slots], axis=-1)
        if len(found) != tokens or (found < 0).any():
            raise MegarlError(f"the routing of request {request_id} was not recorded for all of its {tokens} tokens")
        return found


def _sparse_layers(model: nn.Module) -> list[Any]:
    """vLLM's mixtures of experts in the order of the forward pass."""
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    return sorted((m for m in model.modules() if isinstance(m, MoERunner)), key=lambda layer: layer.layer_id)
