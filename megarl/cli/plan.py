"""`megarl plan CONFIG [key=value ...] [options]`: a run rehearsed at full size."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from megarl.cli.start import AsJson, ConfigPath, Overrides
from megarl.config.cluster import read_cluster
from megarl.config.load import load_config
from megarl.errors import Refusal
from megarl.parallel import terminal
from megarl.rehearsal import rehearse as rehearsal
from megarl.rehearsal.table import print_report

Gpus = Annotated[int | None, typer.Option("--gpus", help="GPUs of the run; default: parallel.processes, or gpus.")]
GpuMemory = Annotated[float | None, typer.Option("--gpu-memory-gib", help="Memory of a GPU; default: the cluster's.")]
ClusterName = Annotated[
    str, typer.Option("--cluster", help="Name in configs/clusters/, or a YAML file like those there.")
]
Schedule = Annotated[
    int | None, typer.Option("--schedule", help="Print that rank's schedule of a weight push instead, a line a box.")
]


def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    gpus: Gpus = None,
    gpu_memory_gib: GpuMemory = None,
    cluster: ClusterName = "h100",
    schedule: Schedule = None,
    as_json: AsJson = False,
) -> None:
    """Rehearse the run of CONFIG at full size on this machine: every rule, and the memory of every phase.

    Ends with code 0 where it fits, 1 where it does not, 2 where a rule is broken.
    """
    if gpus is not None and gpus < 1:
        raise Refusal(f"--gpus {gpus}", "must be at least 1", "give the number of GPUs of the run")
    settings = load_config(config, overrides or ())
    machines = read_cluster(cluster, gpu_memory_gib)
    if schedule is not None and as_json:
        raise Refusal("--schedule with --json", "is text, a line for every box", "leave one of them out")
    if schedule is not None:
        for line in rehearsal.schedule(settings, machines, gpus, schedule):
            print(line)
        return
    report = rehearsal.rehearse(settings, machines, gpus, status=terminal.say)
    if as_json:
        print(json.dumps(report.as_table()))
    else:
        print_report(report)
    if not report.fits:
        raise typer.Exit(1)
