"""The weight push as it is commonly made, to measure the plan's beside: whole tensors everywhere, then vLLM's loader.

Every tensor of the checkpoint is put together on every rank, each part broadcast by one rank that holds it, and
quantised where the engine is in FP8; vLLM's own `load_weights` takes from it what the rank's engine needs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist

from megarl.config.quantisation import scale_name
from megarl.ops.fp8 import quantise_weight
from megarl.policy.policy import Policy
from megarl.reshard.copying import box_view
from megarl.reshard.model_layouts import policy_layout
from megarl.reshard.weight_map import hf_tensors
from megarl.rollout.weights import Fillable, check_reloadable, load_by_name
from megarl.weights.push_plan import weights_in_fp8
from megarl.weights.source import PolicyWeights


class GatherPush:
    """`run` fills the engine with the policy's weights; `received_bytes` counts what this rank was sent meanwhile.

    Raises `Refusal` for an engine that vLLM's loader cannot fill twice.
    """

    def __init__(self, policy: Policy, engine: Fillable) -> None:
        check_reloadable(engine)
        self.policy, self.engine = policy, engine
        self._source = PolicyWeights(policy)
        self.received_bytes = 0
        self._shapes = hf_tensors(policy.shape)
        self._quantised = weights_in_fp8(policy.config, policy.shape)
        layout = policy_layout(policy.shape, policy.config.parallel, policy.world.size)
        # Every part of every tensor comes from the first rank that holds it.
        self._parts = {name: (layout[name][0].tensor, layout[name][0].split.places) for name in self._shapes}

    def run(self) -> None:
        """Collective; the engine's weights must be awake."""
        self.received_bytes = 0
        load_by_name(self.engine, self._tensors())

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor of the engine's checkpoint, whole, on all ranks together."""
        rank, device = self.policy.world.rank, self.policy.world.device
        dtype = self.policy.params_dtype
        for name, (parameter, places) in self._parts.items():
            tensor = torch.empty(self._shapes[name], dtype=dtype, device=device)
            for place in places:
                part = box_view(tensor, place.hf_box)
                piece = torch.empty(part.shape, dtype=dtype, device=device)
                if place.ranks[0] == rank:
                    piece.copy_(box_view(self._source[parameter], place.local_box))
                else:
                    self.received_bytes += piece.nbytes
                dist.broadcast(piece, src=place.ranks[0])
                part.copy_(piece)
            if name in self._quantised:
                made = quantise_weight(tensor)
                yield from ((name, made.values), (scale_name(name), made.scales))
            else:
                yield name, tensor
