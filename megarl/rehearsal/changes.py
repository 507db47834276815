"""Settings that could make a run fit, in the order in which they are worth trying: the cheapest for its speed first.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megarl.config.implied import Implied
from megarl.config.model_shape import ModelShape
from megarl.config.schema import RunConfig


@dataclass(frozen=True, slots=True)
class Change:
    """A run with one setting changed; `text` says which."""

    text: str
    config: RunConfig
    world: int


def changes_for(config: RunConfig, shape: ModelShape, phase: str, world: int) -> Iterator[Change]:
    """What may help the phase that lacks memory. The changed runs may break rules."""

    def changed(section: str, **fields: Any) -> Change:
        update = {section: getattr(config, section).model_copy(update=fields)}
        text = " and ".join(f"{section}.{name}={_yaml(value)}" for name, value in fields.items())
        return Change(f"set {text}", config.model_copy(update=update), world)

    parallel, rollout = config.parallel, config.rollout
    if phase == "rollout":
        if rollout.kv_cache_gib is None and rollout.gpu_memory_fraction < 0.85:
            yield changed("rollout", gpu_memory_fraction=0.85)
        if rollout.max_concurrent > 64:
            yield changed("rollout", max_concurrent=64)
    if phase == "push" and config.weights.bucket_mib > 64:
        yield changed("weights", bucket_mib=64.0)
    if phase in ("push", "rollout"):
        yield changed("rollout", tensor=2 * rollout.tensor)
    if phase in ("train", "train beside", "log-probs"):
        if parallel.tensor > 1 and not parallel.sequence:
            yield changed("parallel", sequence=True)
        least = Implied(config).smallest_microbatch
        if least < config.batch.tokens_per_microbatch:
            yield changed("batch", tokens_per_microbatch=least)
        if config.recompute.kind != "full":
            yield changed("recompute", kind="full")
        yield changed("parallel", context=2 * parallel.context)
    if phase != "rollout":
        if shape.is_moe:
            yield changed("parallel", expert=2 * parallel.expert)
        yield changed("parallel", tensor=2 * parallel.tensor, sequence=True)
        yield changed("parallel", pipeline=2 * parallel.pipeline)
        larger = config.model_copy(update={"parallel": parallel.model_copy(update={"processes": 2 * world})})
        yield Change(f"use {2 * world} GPUs (--gpus)", larger, 2 * world)


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
