"""The weight push: after an update, the policy's shards go straight into the engine's tensors.

The plan is made once from the two layouts. Each rank receives the elements it lacks and copies those it
has; no whole tensor is put together anywhere. What the engine holds afterwards can be looked at again, and compared
with the policy's weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from megarl.config.quantisation import scale_name
from megarl.errors import Interrupted, Refusal
from megarl.ops.fp8 import E4M3, times_blocks
from megarl.parallel.cpu_platform import has_cuda
from megarl.parallel.exchange import anywhere, gather_all
from megarl.policy.policy import Policy
from megarl.reshard.boxes import LocalTensor, contains
from megarl.reshard.copying import box_view
from megarl.reshard.fp8_map import weight_parts
from megarl.reshard.weight_map import megatron_tensors
from megarl.rollout.weights import EngineWeights, Fillable
from megarl.weights.ledger import Journey
from megarl.weights.push_plan import engine_tensors, push_plan, weights_in_fp8
from megarl.weights.quantising import QuantisedWeights, origins
from megarl.weights.source import PolicyWeights, WeightSource
from megarl.weights.transfer import Mover


class EngineChanged(Interrupted):
    """The engine's weights are no longer those that were pushed; names the rank and the parameter."""


class AdapterMissing(Interrupted):
    """A push that left out an adapter: the engine would generate with the base's weights."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A parameter, by its name in a Hugging Face checkpoint, that differs between engine and policy on some rank:
    by at most `largest` (infinite where a NaN is); of FP8 values it is that of the weights they stand for, by the
    engine's scales."""

    name: str
    largest: float


class Push:
    """Executes the push as often as the loop asks, of the policy's weights or what `source` makes of them.

    Raises `Refusal` where vLLM builds the model with other tensors than the plan fills.
    """

    def __init__(self, policy: Policy, engine: Fillable, source: WeightSource | None = None) -> None:
        self.policy = policy
        self._source = source or PolicyWeights(policy)
        self.engine_weights = EngineWeights(engine)
        self._pushed = False
        self._targets = engine_tensors(policy.config, policy.shape, policy.world.rank)
        _check_slots(self.engine_weights, self._targets)
        # A rank late in a large group may hold padding rows of the vocabulary alone: nothing arrives for those tensors.
        self._padding = [name for name, target in self._targets.items() if not target.regions]
        held = megatron_tensors(policy.shape, policy.config.parallel, policy.grid)
        #: What leaves in FP8.
        self._parts = list(weight_parts(held, weights_in_fp8(policy.config, policy.shape)))
        self.mover = Mover(
            push_plan(policy.config, policy.shape, policy.world.rank, policy.world.node_of_rank),
            device=policy.world.device,
            time_limit=policy.config.weights.time_limit,
            computed={name: name for name in policy.adapted} | origins(self._parts),
            say=self._hf_name,
        )
        #: Those of the weights with an adapter that this rank's part of the plan is read from.
        self._adapted: set[str] = set()
        if policy.adapted:
            read = {transfer.source_name for transfer in (*self.mover.plan.sends(), *self.mover.plan.local())}
            read |= {part.tensor for part in self._parts if part.name in read}
            self._adapted = read & policy.adapted.keys()

    def run(self, checked: bool | None = None, version: int = 0) -> None:
        """Fill the engine with the policy's current weights, which are `version` to those who read completions.

        Collective; the engine's weights must be awake. Raises `PushError` where what arrived is compared with what was
        sent, and differs, and `AdapterMissing` where the source has not merged what has an adapter. `checked`: whether
        it is compared, and whether `check` may follow; default: as `weights.checksum` says.
        """
        if checked is None:
            # The first push of a process shows whether the links and the plan are sound.
            checked = {"every": True, "first": not self._pushed, "never": False}[self.policy.config.weights.checksum]
        self.engine_weights.begin(watched=checked)
        layers = _Layers(self.engine_weights)
        for name in self._padding:
            layers.buffer(name)
            layers.complete(name)
        if isinstance(self._source, PolicyWeights):
            self._source.merged.clear()
        self.mover.run(self._leaving(), layers, verify=checked)
        self._require_adapters()
        self._pushed = True
        self.engine_weights.end(self.mover.lying, version)

    def _leaving(self) -> WeightSource:
        """The weights as they travel."""
        return QuantisedWeights(self._source, self._parts) if self._parts else self._source

    def _require_adapters(self) -> None:
        """Raise `AdapterMissing` on all ranks where a tensor left one without the adapter that it has. Collective."""
        if self.policy.network.adapter is None:
            return
        merged = self._source.merged if isinstance(self._source, PolicyWeights) else frozenset[str]()
        missing = sorted(self._adapted - merged)
        if not anywhere(bool(missing)):
            return
        rank, names = next((rank, names) for rank, names in enumerate(gather_all(missing)) if names)
        raise AdapterMissing(
            f"weight push: rank {rank} sent {shortened(names)} without the adapter that the policy computes with, so "
            "the engine would generate with the base's weights. The policy's weights are unharmed. Fix: make the "
            "source of the push one that merges, as megarl.weights.source.PolicyWeights does"
        )

    def check(self) -> None:
        """Raise `EngineChanged` on all ranks where the engine holds anything but what a checked push left in it.

        Collective; the engine's weights must be awake, and on the CPU the policy's the same as in the push.
        """
        changed = self.engine_weights.changed()
        if not anywhere(bool(changed)):
            return
        everywhere = gather_all(changed)
        rank = next(rank for rank, slots in enumerate(everywhere) if slots)
        targets = engine_tensors(self.policy.config, self.policy.shape, rank)
        names = list(dict.fromkeys(r.hf_name for slot in everywhere[rank] for r in targets[slot].regions))
        if not has_cuda():
            # Of what the engine holds as one, only a part may differ. On a GPU the policy's weights are away now.
            found = self.differences({slot for slots in everywhere for slot in slots})
            names = [f"{one.name} (by up to {one.largest:.3g})" for one in found] or names
        raise EngineChanged(
            f"the engine of rank {rank} does not hold any more what was pushed into it: {shortened(names)} changed "
            "before or while it generated. Nothing is learned from that, and the policy's weights are unharmed. Fix: "
            f"start again from the last checkpoint, without the host of rank {rank} if it happens again"
        )

    def differences(self, slots: Collection[str] | None = None) -> list[Difference]:
        """Parameters in which an engine differs from the policy's current weights, the same list on all ranks.

        Collective. The engine's tensors, or `slots` of them, are read as its kernels use them, one by one, and compared
        with what a push would write; nothing is written.
        """
        comparison = _Comparison(self.engine_weights, self._targets, slots)
        self.mover.run(self._leaving(), comparison)
        found: dict[str, float] = {}
        for part in gather_all(comparison.found):
            for name, largest in part.items():
                found[name] = max(largest, found.get(name, 0.0))
        return [Difference(name, largest) for name, largest in sorted(found.items())]

    def _hf_name(self, piece: Journey) -> str:
        """What a piece on its way to any rank's engine is called in a checkpoint."""
        regions = engine_tensors(self.policy.config, self.policy.shape, piece.target)[piece.name].regions
        return next(region.hf_name for region in regions if contains(region.local_box, piece.box))


def shortened(names: Sequence[str]) -> str:
    """A list of names for a message."""
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


class _Comparison:
    """A push's target that keeps nothing: `found` is the largest difference by parameter."""

    def __init__(self, weights: EngineWeights, targets: dict[str, LocalTensor], slots: Collection[str] | None) -> None:
        self._weights, self._targets = weights, targets
        self._slots = targets.keys() if slots is None else slots
        self._open: dict[str, torch.Tensor] = {}
        self.found: dict[str, float] = {}

    def buffer(self, name: str) -> torch.Tensor:
        if name not in self._open:
            slot = self._weights.tensors()[name]
            self._open[name] = torch.zeros(slot.shape, dtype=slot.dtype, device=self._weights.device)
        return self._open[name]

    def complete(self, name: str) -> None:
        wanted = self._open.pop(name)
        for held in self._weights.held(name) if name in self._slots else ():
            apart = wanted.float() - held.to(wanted.dtype).float()
            if wanted.dtype == E4M3:
                # Scales that differ are found under their own name.
                apart = times_blocks(apart, self._weights.held(scale_name(name))[0])
            for region in self._targets[name].regions:
                largest = float(box_view(apart, region.local_box).abs().nan_to_num(nan=torch.inf).max())
                if largest > 0:
                    self.found[region.hf_name] = max(largest, self.found.get(region.hf_name, 0.0))


class _Layers:
    """Hands pieces to the engine and closes a layer when its last parameter is complete.

    A layer's weight and bias are closed together, because the engine may pack them as one.
    """

    def __init__(self, weights: EngineWeights) -> None:
        self._weights = weights
        self._open = Counter(_layer(name) for name in weights.tensors())
        self._complete: dict[str, list[str]] = {}

    def buffer(self, name: str) -> torch.Tensor:
        return self._weights.buffer(name)

    def complete(self, name: str) -> None:
        layer = _layer(name)
        self._complete.setdefault(layer, []).append(name)
        if len(self._complete[layer]) == self._open[layer]:
            self._weights.finish(self._complete[layer])


def _layer(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _check_slots(weights: EngineWeights, targets: dict[str, LocalTensor]) -> None:
    slots = {name: slot.shape for name, slot in weights.tensors().items()}
    wanted = {name: target.shape for name, target in targets.items()}
    for name in sorted(slots.keys() | wanted.keys()):
        if slots.get(name) != wanted.get(name):
            raise Refusal(
                f"{name} of shape {slots.get(name)} in vLLM",
                f"must have shape {wanted.get(name)} by the model's config.json",
                "use a model whose sizes vLLM takes from config.json as they are there (vLLM's Qwen2 ignores head_dim)",
            )
