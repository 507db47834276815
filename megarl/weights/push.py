"""The weight push: after an update, the policy's shards go straight into the engine's tensors.

The plan is made once from the two layouts. Each rank receives the elements it lacks and copies those it
has; no whole tensor is put together anywhere.
"""

from __future__ import annotations

from collections import Counter

import torch

from megarl.errors import Refusal
from megarl.formats.huggingface import PRECISIONS
from megarl.policy.policy import Policy
from megarl.reshard.boxes import LocalTensor
from megarl.rollout.weights import EngineWeights, Fillable
from megarl.weights.push_plan import engine_tensors, push_plan
from megarl.weights.transfer import Mover


class Push:
    """Executes the push as often as the loop asks.

    Raises `Refusal` where vLLM builds the model with other tensors than the plan fills.
    """

    def __init__(self, policy: Policy, engine: Fillable) -> None:
        self.policy = policy
        self.engine_weights = EngineWeights(engine)
        self._pushed = False
        targets = engine_tensors(policy.config, policy.shape, policy.world.rank)
        _check_slots(self.engine_weights, targets)
        # A rank late in a large group may hold padding rows of the vocabulary alone: nothing arrives for those tensors.
        self._padding = [name for name, target in targets.items() if not target.regions]
        self.mover = Mover(
            push_plan(policy.config, policy.shape, policy.world.rank, policy.world.node_of_rank),
            dtype=PRECISIONS[policy.config.engine_precision],
            device=policy.world.device,
            time_limit=policy.config.weights.time_limit,
        )

    def run(self) -> None:
        """Fill the engine with the policy's current weights. Collective; the engine's weights must be awake.

        Raises `PushError` where checksums are compared (`weights.checksum`) and differ.
        """
        self.engine_weights.begin()
        layers = _Layers(self.engine_weights)
        for name in self._padding:
            layers.buffer(name)
            layers.complete(name)
        # The first push of a process shows whether the links and the plan are sound.
        verify = {"every": True, "first": not self._pushed, "never": False}[self.policy.config.weights.checksum]
        self.mover.run({name: p.detach() for name, p in self.policy.named_parameters()}, layers, verify=verify)
        self._pushed = True
        self.engine_weights.end()


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
