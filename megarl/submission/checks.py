"""What is known of a run before it waits in a queue: its rules, its files, its memory, its past."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

from megarl.config import files, fp8_rules, gpu_rules, rules
from megarl.config.cluster import GIB, Cluster
from megarl.config.model_shape import read_model_shape
from megarl.config.schema import RunConfig
from megarl.errors import Refusal
from megarl.rehearsal.rehearse import rehearse
from megarl.submission.resources import Resources, seconds_of, shown_time
from megarl.train import past


def rule_refusals(config: RunConfig, cluster: Cluster, resources: Resources) -> Iterator[Refusal]:
    """Every rule that needs no file but the model's config.json; first those about the job's size, last those of the
    cluster's GPUs, or of a job without any."""
    yield from _size_refusals(config, resources)
    yield from rules.broken_setting_rules(config, processes=resources.world)
    if resources.gpus_per_node:
        yield from gpu_rules.refusals(config, read_model_shape(config.model.path), cluster.capability)
    else:
        yield from fp8_rules.on_cpu(config)


def file_refusals(config: RunConfig) -> Iterator[Refusal]:
    """What is missing on disk, which a job's nodes share with this machine."""
    yield from files.refusals(config)


def history_refusals(config: RunConfig, time: str | None, lead: float) -> Iterator[Refusal]:
    """What a run of this name that is there already makes impossible.

    `time` is the job's limit in Slurm's form, None where it is the cluster's; `lead` the seconds before it at which the
    run is told to save.
    """
    folder = Path(config.runs_dir) / config.name
    metrics = folder / "metrics.jsonl"
    yield from past.refusals(config)
    if time is not None and seconds_of(time) <= lead:
        yield Refusal(
            f"--time {time}",
            f"is not longer than the {lead:.0f} s before the limit at which the run is told to save",
            "give more time, or a later signal, such as --sbatch=--signal=USR1@60",
        )
    step = step_seconds(metrics)
    if time is not None and step is not None and step + lead > seconds_of(time):
        yield Refusal(
            f"--time {time}",
            f"is shorter than a step, {step:.0f} s by {metrics}, and the {lead:.0f} s before the limit for saving",
            f"use --time {shown_time(step + lead)} or more",
        )


def step_seconds(metrics: Path) -> float | None:
    """The median over steps of all phases' seconds in a metrics.jsonl; None where no step is known."""
    steps: list[float] = []
    for text in metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else ():
        try:
            line = json.loads(text)
        except ValueError:
            # The run may be writing it.
            continue
        if isinstance(line.get("seconds"), dict) and "accuracy" not in line:
            steps.append(sum(line["seconds"].values()))
    return median(steps) if steps else None


def rehearsed(config: RunConfig, cluster: Cluster, resources: Resources, status: Callable[[str], None]) -> str:
    """The verdict of a rehearsal as in `megarl plan`, in a sentence. Takes seconds.

    `status` is told so. Raises `Refusal` for a run that does not fit the cluster's GPUs, and for a rule that GPUs have.
    """
    nodes = cluster.model_copy(update={"gpus_per_node": resources.gpus_per_node})
    report = rehearse(config, nodes, resources.world, status)
    if report.fits:
        return report.verdict
    verdict, _, fix = report.verdict.replace("(--gpus)", "(--nodes)").partition(" Fix: ")
    size = f"{resources.nodes} nodes with {resources.gpus_per_node} GPUs of {cluster.gpu_memory / GIB:.1f} GiB each"
    raise Refusal(f"{config.name} on {size}", verdict, fix)


def _size_refusals(config: RunConfig, resources: Resources) -> Iterator[Refusal]:
    parallel, world = config.parallel, resources.world
    given = f"--nodes {resources.nodes} with {resources.of_a_node} each"
    if parallel.processes not in (None, world):
        yield Refusal(
            given,
            f"starts {world} processes, and the run is for parallel.processes={parallel.processes}",
            "change the number of nodes or tasks, or give parallel.processes=null",
        )
    grid = parallel.tensor * parallel.pipeline * parallel.context
    if world % grid:
        least = grid // math.gcd(grid, resources.tasks_per_node)
        must = "fewer than" if world < grid else "no multiple of"
        yield Refusal(
            given,
            f"starts {world} processes, {must} the {grid} of parallel.tensor x parallel.pipeline x parallel.context",
            f"use --nodes {least} or a multiple of it, or a smaller layout",
        )
