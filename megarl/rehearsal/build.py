"""A rehearsal in this process: shards built, memory added up, and the setting to change where it does not suffice."""

from __future__ import annotations

from collections.abc import Iterator

from megarl import algorithms
from megarl.algorithms.base import AlgorithmContext
from megarl.config import rules
from megarl.config.cluster import GIB, Cluster
from megarl.config.grid import grid_of_rank
from megarl.config.implied import Implied
from megarl.config.model_shape import ModelShape
from megarl.config.schema import RunConfig
from megarl.errors import Refusal
from megarl.policy.forward import check_rotary_on_gpu
from megarl.rehearsal import engine
from megarl.rehearsal.changes import Change, changes_for
from megarl.rehearsal.hours import hours_of
from megarl.rehearsal.memory import Run, host_of, phases_of
from megarl.rehearsal.push import push_traffic
from megarl.rehearsal.report import HostMemory, PhaseMemory, Report
from megarl.rehearsal.shards import count_parameters, shards_of


def build_report(config: RunConfig, shape: ModelShape, cluster: Cluster, world: int) -> Report:
    """Rehearse a run that keeps the rules of settings, in a process that has joined no world.

    Raises `Refusal` for what Megatron's configuration, the engine's tensors or a GPU's layers refuse, and `MegarlError`
    where the shards do not add up to the model.
    """
    check_rotary_on_gpu(shape)
    run = _run(config, shape, cluster, world)
    shards = shards_of(config, shape, world)
    phases = tuple(phases_of(run, shards))
    host = host_of(run, shards, world)
    short = _short(run, phases)
    return Report(
        name=config.name,
        processes=world,
        layout=_layout(config, shape, world),
        parameters=count_parameters(shape, shards),
        work=run.work,
        phases=phases,
        kv_cache=None if run.engine is None else run.engine.cache,
        host=host,
        fits=short is None and host.used <= host.limit,
        verdict=_verdict(run, phases, short, host, world),
        notes=tuple(_notes(config, cluster, world)),
        push=None if run.engine is None else push_traffic(config, shape, cluster, world),
        hours=hours_of(config, shape, cluster, world),
    )


def _run(config: RunConfig, shape: ModelShape, cluster: Cluster, world: int) -> Run:
    context = AlgorithmContext(
        config.rollout.max_tokens, config.rollout.group_size, steps=config.steps, reward_low=config.reward.bounds[0]
    )
    return Run(
        config,
        shape,
        cluster,
        algorithms.build(config.algorithm, context),
        replicas=grid_of_rank(0, world, config.parallel).data,
        engine=engine.engine_memory(config, shape, cluster) if Implied(config).has_engine else None,
    )


def _layout(config: RunConfig, shape: ModelShape, world: int) -> dict[str, int]:
    grid = grid_of_rank(0, world, config.parallel)
    experts = {"expert": grid.expert, "expert_tensor": grid.expert_tensor} if shape.is_moe else {}
    return {
        "tensor": grid.tensor,
        "pipeline": grid.pipeline,
        "virtual_pipeline": config.parallel.virtual_pipeline or 1,
        "context": grid.context,
        "data": grid.data,
        **experts,
        "rollout_tensor": config.rollout.tensor,
        "replicas": world // config.rollout.tensor,
    }


def _lacking(run: Run, phase: PhaseMemory) -> int:
    """Bytes that a phase lacks; a cache must hold the longest sequence."""
    lacking = -phase.margin
    if phase.phase == "rollout":
        least = run.implied.longest_engine_sequence * engine.kv_bytes_per_token(run.config, run.shape)
        if run.config.rollout.kv_cache_gib is None:
            # The cache takes what is left of the engine's share: what the rest wants of it counts.
            share = int(run.config.rollout.gpu_memory_fraction * run.cluster.gpu_memory)
            lacking = phase.used - phase.of("KV cache") + least - share
        else:
            lacking = max(lacking, least - phase.of("KV cache"))
    return lacking


def _short(run: Run, phases: tuple[PhaseMemory, ...]) -> PhaseMemory | None:
    """The phase that lacks most, None where all have enough."""
    worst = max(phases, key=lambda phase: _lacking(run, phase))
    return worst if _lacking(run, worst) > 0 else None


def _verdict(run: Run, phases: tuple[PhaseMemory, ...], short: PhaseMemory | None, host: HostMemory, world: int) -> str:
    if short is not None:
        lacking, what, there = _lacking(run, short), "a GPU has", short.limit
        if short.phase == "rollout" and run.config.rollout.kv_cache_gib is None:
            what, there = "the engine's share of a GPU is", int(there * run.config.rollout.gpu_memory_fraction)
        return (
            f"does not fit: {short.phase} on pipeline stage {short.stage} needs {(there + lacking) / GIB:.1f} GiB, and "
            f"{what} {there / GIB:.1f} GiB. {_advice(run, short, world)}"
        )
    if host.used > host.limit:
        return (
            f"does not fit: a node's host must keep {host.used / GIB:.0f} GiB and has {host.limit / GIB:.0f} GiB. "
            "Fix: use more GPUs (--gpus), over which the optimizer's state is spread."
        )
    # A cache that takes what is left of its share says nothing by its size.
    fills = run.config.rollout.kv_cache_gib is None
    tightest = min((p for p in phases if not (p.phase == "rollout" and fills)), key=lambda phase: phase.margin)
    cache = "" if run.engine is None else f"; {run.engine.cache.sequences:,} of the longest sequences fit the cache"
    return (
        f"fits: the tightest is {tightest.phase} on pipeline stage {tightest.stage}, with "
        f"{tightest.margin / GIB:.1f} of {tightest.limit / GIB:.1f} GiB left{cache}"
    )


def _is_broken(change: Change, run: Run) -> bool:
    """Whether a run with the change would break a rule."""
    try:
        return any(rules.broken_setting_rules(change.config, run.shape, change.world))
    except Refusal:
        return True


def _advice(run: Run, short: PhaseMemory, world: int) -> str:
    """The setting most worth changing: the first with which all fits, else the one that brings the phase nearest."""
    nearest: tuple[int, Change] | None = None
    for change in changes_for(run.config, run.shape, short.phase, world):
        if _is_broken(change, run):
            continue
        trial = _run(change.config, run.shape, run.cluster, change.world)
        shards = shards_of(change.config, run.shape, change.world)
        lacking = max(_lacking(trial, phase) for phase in phases_of(trial, shards))
        if lacking <= 0:
            return f"Fix: {change.text}, with which it fits."
        if nearest is None or lacking < nearest[0]:
            nearest = lacking, change
    if nearest is None:
        return "Fix: use GPUs with more memory."
    return f"Fix: {nearest[1].text} first, with which {nearest[0] / GIB:.1f} GiB are still lacking."


def _notes(config: RunConfig, cluster: Cluster, world: int) -> Iterator[str]:
    if world > cluster.gpus_per_node and world % cluster.gpus_per_node:
        yield f"{world} processes do not fill nodes of {cluster.gpus_per_node} GPUs"
    if cluster.gpus_per_node % config.rollout.tensor:
        yield f"an engine of {config.rollout.tensor} GPUs does not stay inside a node of {cluster.gpus_per_node}"
    for name in ("use_precision_aware_optimizer", "optimizer_cpu_offload", "cpu_offloading"):
        if config.megatron.get(name):
            yield f"megatron.{name} changes what memory holds and is not modelled"
    for name in ("kv_cache_dtype", "cpu_offload_gb", "speculative_config"):
        if config.vllm.get(name):
            yield f"vllm.{name} changes what memory holds and is not modelled"
