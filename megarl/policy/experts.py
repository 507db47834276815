"""The routers of a mixture of experts: told what is padding and which experts to take, and asked what they chose.

Megatron hands its routers tokens and nothing else that holds for every layout, so each router's forward pass is
wrapped. A router goes through the micro-batches in order, once, or twice where the layer is recomputed: the first time
without a gradient, and again, in the same order, for the backward pass. So the number of a pass among those of its kind
is the number of its micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.router import TopKRouter

from megarl.config.grid import Grid
from megarl.config.model_shape import ModelShape
from megarl.parallel.exchange import gather_all
from megarl.policy.batch import MicroBatch


class Experts:
    """All routers of this rank's model chunks. `coefficient` is that of the load-balancing loss.

    With `replay` tokens go to the experts that `MicroBatch.routed` names, where it does; else it is only compared.
    """

    def __init__(
        self, chunks: Iterable[Any], shape: ModelShape, grid: Grid, *, coefficient: float, replay: bool
    ) -> None:
        sparse = [layer for layer in range(shape.num_layers) if shape.is_sparse(layer)]
        self._shape, self._grid, self._coefficient = shape, grid, coefficient
        self._balances = False
        modules: list[Any] = [m for chunk in chunks for m in chunk.modules() if isinstance(m, TopKRouter)]
        # Megatron counts layers from 1, over the whole model.
        self._routers = [_Router(module, sparse.index(module.layer_number - 1), replay) for module in modules]

    def begin(self, batches: Sequence[MicroBatch], sequence_parallel: int, *, training: bool) -> None:
        """Called by all ranks before each pass over micro-batches; `training` ones are those with a backward pass."""
        coefficient = 0.0
        get_moe_metrics_tracker().clear()
        self._balances = bool(training and self._coefficient)
        if self._balances:
            grid = self._grid
            counts = grid.tensor_rank == 0 and grid.context_rank == 0 and grid.pipeline_rank == 0
            tokens = sum(gather_all(sum(batch.real_tokens for batch in batches) if counts else 0))
            # Megatron multiplies the loss of a micro-batch by the tokens of one rank, as it believes, and by the number
            # of ranks that share them. Its count is of all of them already: it is summed over these ranks in place.
            coefficient = self._coefficient / max(tokens, 1) / (grid.tensor * grid.context)
        parts = [_Part(batch, self._grid.tensor_rank, sequence_parallel) for batch in batches]
        for router in self._routers:
            router.begin(parts, coefficient)

    def report(self, micro_batches: int) -> dict[str, float]:
        """What the routers chose since `begin`, over all ranks, on every rank; `micro_batches` were this rank's.

        expert_load_max: tokens of the busiest expert of any layer / the mean; experts_idle: share of a layer's experts
        without a token, mean over layers; routing_differs: share of routings (tokens x layers) to other experts than
        the engine's, where those are known; router_aux_loss: mean over layers and micro-batches, without coefficient.
        """
        own = {router.number: router.load.cpu().numpy() for router in self._routers}
        compared = np.sum([router.compared.cpu().numpy() for router in self._routers] or [np.zeros(2)], axis=0)
        tracked = get_moe_metrics_tracker().metrics.get("load_balancing_loss")
        aux = float(tracked.values.sum()) if tracked and self._balances else 0.0
        found = gather_all((own, compared, aux, micro_batches if self._grid.reports else 0))
        loads = np.zeros((sum(self._shape.sparse_layers), self._shape.num_experts))
        for load, *_ in found:
            for number, counts in load.items():
                loads[number] += counts
        report = {
            "expert_load_max": float((loads.max(1) / np.maximum(loads.mean(1), 1e-9)).max()),
            "experts_idle": float((loads == 0).mean()),
        }
        differing, total = np.sum([one for _, one, _, _ in found], axis=0)
        if total:
            report["routing_differs"] = float(differing / total)
        if self._balances:
            passes = sum(count for *_, count in found) * len(loads)
            report["router_aux_loss"] = sum(aux for _, _, aux, _ in found) / max(passes, 1)
        return report


class _Part:
    """The tokens of a micro-batch that this rank's routers see, in their order: position first, then row."""

    def __init__(self, batch: MicroBatch, tensor_rank: int, sequence_parallel: int) -> None:
        share = batch.tokens.shape[1] // sequence_parallel
        start = tensor_rank * share if sequence_parallel > 1 else 0
        self.empty = batch.num_sequences == 0
        self.padding = batch.padding.T[start : start + share].contiguous()
        # (tokens, sparse layers, k)
        self.routed = None
        if batch.routed is not None:
            self.routed = batch.routed.transpose(0, 1)[start : start + share].flatten(0, 1)


class _Router:
    """One router. `number` is that of its layer among the sparse ones of the model.

    `load`: real tokens of each expert; `compared`: tokens with other experts than named, and tokens with named ones.
    Both are counted on the device, so that no pass waits for it.
    """

    def __init__(self, module: Any, number: int, replay: bool) -> None:
        self.module, self.number = module, number
        self._replay = replay
        self._original: Callable[..., tuple[torch.Tensor, torch.Tensor]] = module.forward
        module.forward = self._forward
        # Where Megatron asks a recorder which experts to take.
        module.router_replay = self
        self.begin([], 0.0)

    def begin(self, parts: Sequence[_Part], coefficient: float) -> None:
        self._parts, self._coefficient = parts, coefficient
        self._passes = {False: 0, True: 0}
        self._counted_kind: bool | None = None
        self._part: _Part | None = None
        device = self.module.weight.device
        self.load = torch.zeros(self.module.config.num_moe_experts, dtype=torch.int64, device=device)
        self.compared = torch.zeros(2, dtype=torch.int64, device=device)

    def _forward(self, hidden: torch.Tensor, padding_mask: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        kind = torch.is_grad_enabled()
        if self._counted_kind is None:
            self._counted_kind = kind
        self._part = part = self._parts[self._passes[kind]]
        self._passes[kind] += 1
        # Nothing to balance among padding.
        self.module.config.moe_aux_loss_coeff = 0.0 if part.empty else self._coefficient
        weights, chosen = self._original(hidden, padding_mask=part.padding)
        if kind == self._counted_kind:
            self.load += (chosen & ~part.padding.reshape(-1, 1)).sum(0)
        return weights, chosen

    def get_replay_topk(
        self,
        scores: torch.Tensor,
        topk: int,
        num_groups: Any,
        group_topk: Any,
        default_compute_topk: Callable[..., Any],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Megatron's question: values and indices (tokens, k) of the experts to take by `scores` (tokens, experts)."""
        values, indices = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        part = self._part
        if part is None or part.routed is None:
            return values, indices
        named = part.routed[:, self.number].to(indices)
        known = named[:, 0] >= 0
        if torch.is_grad_enabled() == self._counted_kind:
            differs = (indices.sort(1).values != named.sort(1).values).any(1) & known
            self.compared += torch.stack((differs.sum(), known.sum()))
        if not self._replay:
            return values, indices
        indices = torch.where(known[:, None], named, indices)
        return scores.gather(1, indices), indices
