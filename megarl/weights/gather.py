"""The weight push as it is commonly made, to measure the plan's beside: whole tensors everywhere, then vLLM's loader.

Every tensor of the checkpoint is put together on every rank, each part broadcast by one rank that holds it; vLLM's own
`load_weights` takes from it what the rank's engine needs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist

from megarl.policy.policy import Policy
from megarl.reshard.boxes import numel
from megarl.reshard.copying import box_view, copy_box
from megarl.reshard.plan import Transfer, make_plan
from megarl.reshard.weight_map import checkpoint_tensors
from megarl.rollout.weights import Fillable, check_reloadable, load_by_name
from megarl.weights.layouts import policy_tensors


class GatherPush:
    """`run` fills the engine with the policy's weights; `received_bytes` counts what this rank was sent meanwhile.

    Raises `Refusal` for an engine that vLLM's loader cannot fill twice.
    """

    def __init__(self, policy: Policy, engine: Fillable) -> None:
        check_reloadable(engine)
        self.policy, self.engine = policy, engine
        self.received_bytes = 0
        world = policy.world
        whole = checkpoint_tensors(policy.shape)
        self._shapes = {name: tensor.shape for name, tensor in whole.items()}
        # One holder of every part of every tensor: who would send it to a rank that has nothing.
        nobody: list[dict] = [{} for _ in range(world.size)]
        sources = [*policy_tensors(policy.config.parallel, policy.shape, world.size), {}]
        plan = make_plan(sources, [*nobody, whole], [*world.node_of_rank, -1])
        self._parts: dict[str, list[Transfer]] = {name: [] for name in whole}
        for transfer in plan.transfers:
            self._parts[transfer.target_name].append(transfer)

    def run(self) -> None:
        """Collective; the engine's weights must be awake."""
        self.received_bytes = 0
        load_by_name(self.engine, self._tensors())

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor of the checkpoint, whole, on all ranks together."""
        parameters = {name: parameter.detach() for name, parameter in self.policy.named_parameters()}
        rank, device = self.policy.world.rank, self.policy.world.device
        dtype = self.policy.megatron_config.params_dtype
        for name, parts in self._parts.items():
            tensor = torch.empty(self._shapes[name], dtype=dtype, device=device)
            for part in parts:
                piece = torch.empty(numel(part.target_box), dtype=dtype, device=device)
                view = piece.view(box_view(tensor, part.target_box).shape)
                if part.source == rank:
                    view.copy_(box_view(parameters[part.source_name], part.source_box).reshape(view.shape))
                else:
                    self.received_bytes += piece.nbytes
                dist.broadcast(piece, src=part.source)
                copy_box(tensor, part.target_box, view, tuple((0, length) for length in view.shape))
            yield name, tensor
