"""The `health:` section of a run's file: what is looked at before it starts, and what watches over it. Torch-free."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat

from megarl.config.base import Settings

#: What a rank may be doing. `start` is building the session, `step` what lies between the phases of a step, `finish`
#: what follows the last step.
Phase = Literal[
    "start",
    "step",
    "data",
    "push",
    "generate",
    "score",
    "replay",
    "advantages",
    "gauges",
    "probes",
    "old_log_probs",
    "reference_log_probs",
    "teacher_log_probs",
    "update",
    "evaluate",
    "save",
    "finish",
]


class PreflightSettings(Settings):
    """What is looked at on every rank before anything is built. All bounds are our choice."""

    enabled: bool = Field(default=True, description="Look before the run starts; off: start on whatever is there.")
    limit: PositiveFloat = Field(
        default=120.0, description="Seconds for each rank to look at its host; then those that have not are named."
    )
    clock_skew: PositiveFloat = Field(
        default=60.0,
        description="Most seconds between the clocks of two hosts: times in logs and of shared files are compared.",
    )
    disk_free_gib: NonNegativeFloat = Field(
        default=1.0, description="Least free space in the run directory's file system, in GiB."
    )
    gpu_free_share: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.9, description="Least share of a GPU's memory that is free before the run takes its own."
    )
    shared_memory_mib: NonNegativeFloat = Field(
        default=64.0, description="Least free space in /dev/shm per process of a host with GPUs, in MiB: NCCL needs it."
    )
    slow_link_share: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.25,
        description="A link is bad below that share of the median of its kind (of fewer than five: of the fastest). "
        "Links within a host are judged on GPUs only. 0: none is bad.",
    )
    message_mib: PositiveFloat = Field(
        default=8.0, description="Size of the messages that links are timed with, in MiB; on GPUs eight times as much."
    )


class HealthSettings(Settings):
    """All times in seconds. All are our choice."""

    preflight: PreflightSettings = PreflightSettings()
    gap_limit: PositiveFloat | None = Field(
        default=0.2,
        description="The run stops before it learns from a step whose sampled tokens have log-probs that differ "
        "between engine and policy by more than that in the mean, in nats per token, or are not finite in the engine "
        "alone; null: no limit. Kernels differ by 1e-6 in fp32 and 0.01 in bf16, other weights or positions by 0.4 and "
        "more. What is replayed, or was written by other weights than the policy's current ones, is not looked at.",
    )
    memory_growth_mib: PositiveFloat | None = Field(
        default=50.0,
        description="On GPUs the run warns where what is in use while neither the policy nor the engine is there has "
        "grown by more MiB in 50 steps; null: never.",
    )
    join_limit: PositiveFloat = Field(
        default=600.0, description="How long ranks wait for each other when the run starts; then the missing are named."
    )
    watchdog: bool = Field(
        default=True, description="End the run, with every rank's stacks and one message, where a rank hangs or dies."
    )
    interval: PositiveFloat = Field(
        default=1.0,
        description="Time between two signs of life of a rank. Each is a few requests to the ranks' store: 2 or more "
        "for thousands of ranks.",
    )
    silence: PositiveFloat = Field(
        default=120.0, description="A rank without a sign of life for so long has stopped, whatever its phase."
    )
    first_limit: PositiveFloat = Field(
        default=1800.0,
        description="A rank that makes no progress for so long hangs, in a phase that it has not been through before.",
    )
    least_limit: PositiveFloat = Field(default=300.0, description="As first_limit, at least, in a known phase.")
    scale: Annotated[float, Field(gt=1)] = Field(
        default=10.0,
        description="A rank hangs in a known phase when it makes no progress for so many times the longest pause that "
        "the phase has had, and for least_limit.",
    )
    limits: dict[Phase, PositiveFloat] = Field(
        default={}, description="Limits of single phases, in place of first_limit, least_limit and scale."
    )
    notice: PositiveFloat = Field(
        default=270.0,
        description="Time between SIGUSR1 and the end of the processes: what cannot be finished in it is given up and "
        "made again. slurm/train.sbatch has Slurm send it 300 s ahead of the time limit.",
    )
    term_notice: PositiveFloat = Field(
        default=25.0,
        description="The same after SIGTERM, which Slurm follows with SIGKILL after KillWait (30 s), and after Ctrl-C, "
        "Ctrl-\\ and a terminal that hangs up.",
    )
