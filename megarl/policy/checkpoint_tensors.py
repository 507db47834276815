"""Which tensors of a policy a checkpoint has, and where in it: Megatron's sharded state, set by set.

To save it gives them; to load, where they go.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding

from megarl.config.parameter_sets import ADAPTER, POLICY
from megarl.formats import checkpoint_folder, megatron
from megarl.policy import adam_state
from megarl.policy.delayed_scaling import DelayedScaling
from megarl.policy.policy import Policy

#: What the keys begin with of how a frozen base's layers scale, which is saved without its weights; and the whole key
#: of how Transformer Engine's do.
SCALING = "scaling."


def modules_saved(policy: Policy, progress: Mapping[str, Any]) -> dict[str, Sequence[Any]]:
    """The policy's own modules that a checkpoint has the weights of, by the set that they were saved with."""
    network = policy.network
    if "adapter" in progress:
        return {POLICY: [network.adapter]}
    found: dict[str, Sequence[Any]] = {POLICY: network.chunks}
    return found | ({ADAPTER: [network.adapter]} if "beside" in progress else {})


def weights_by_set(modules: Mapping[str, Sequence[Any]], content: Mapping[str, Any]) -> dict[str, Any]:
    """The weights of these modules, by the sets that they are of; `content` says how the checkpoint names tensors."""
    return {
        _key(key, name): tensors
        for name, parts in modules.items()
        for key, tensors in weights(parts, content, name).items()
    }


def weights(modules: Sequence[Any], content: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The weights of one set's modules."""
    found = dict[str, Any]()
    # Megatron adds this layout's process groups to the record that it is given.
    metadata = dict(content)
    for key, model in by_key(modules).items():
        tensors = model.sharded_state_dict(metadata=metadata)
        found[key] = {k: v for k, v in tensors.items() if not megatron.is_extra_state(k)}
    if name != POLICY:
        add_prefix_for_sharding(found, f"{checkpoint_folder.SETS}{name}.")
    return found


def of_training(policy: Policy) -> dict[str, Any]:
    """What is saved beside the weights: optimizers and schedules, and how a frozen base's layers scale."""
    state = scaling_of_base(policy, megatron.CONTENT)
    for name, trained in policy.trained.items():
        places = weights(trained.modules, megatron.CONTENT, name)
        state[_key("optimizer", name)] = adam_state.boxes(adam_state.owned(trained.optimizer), places)
        state[_key("scheduler", name)] = trained.scheduler.state_dict()
    return state


def scaling_of_base(policy: Policy, content: Mapping[str, Any]) -> dict[str, Any]:
    """How the layers of a frozen base scale; nothing where it trains."""
    state: dict[str, Any] = {}
    if policy.network.base_is_frozen:
        for key, model in by_key(policy.network.chunks).items():
            tensors = model.sharded_state_dict(metadata=dict(content))
            state[SCALING + key] = {k: v for k, v in tensors.items() if megatron.is_scaling(k)}
    return state


def delayed_scalings(policy: Policy, names: Iterable[str]) -> dict[str, DelayedScaling]:
    """That of Transformer Engine's layers, by the sets whose networks have it: of each network once."""
    found: dict[str, DelayedScaling] = {}
    for name in names:
        scaling = policy.trained[name].network.delayed_scaling
        if scaling is not None and scaling not in found.values():
            found[name] = scaling
    return found


def of_delayed_scaling(policy: Policy, names: Iterable[str]) -> dict[str, Any]:
    """What is saved of it."""
    state: dict[str, Any] = {}
    for name, scaling in delayed_scalings(policy, names).items():
        tensors = scaling.sharded()
        if name != POLICY:
            add_prefix_for_sharding(tensors, f"{checkpoint_folder.SETS}{name}.")
        state[_key(SCALING, name)] = tensors
    return state


def of_set(state: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What a loaded state has of one set, under the keys of the policy's own."""
    prefix = _key("", name)
    return {
        key.removeprefix(prefix): value
        for key, value in state.items()
        if key.startswith(prefix) and (name != POLICY or not key.startswith(checkpoint_folder.SETS))
    }


def by_key(modules: Sequence[Any]) -> dict[str, Any]:
    """Modules by Megatron's keys: model, or of several chunks model0, ..."""
    return {"model": modules[0]} if len(modules) == 1 else {f"model{i}": one for i, one in enumerate(modules)}


def _key(key: str, name: str) -> str:
    """Where a set's part of the state stands."""
    return key if name == POLICY else f"{checkpoint_folder.SETS}{name}.{key}"
