"""`megarl submit CONFIG [key=value ...] --nodes N [options]`: a run as Slurm jobs."""

from __future__ import annotations

import shlex
import sys
from typing import Annotated

import typer

from megarl.cli.start import ConfigPath, Overrides
from megarl.config.cluster import read_cluster
from megarl.config.load import load_config
from megarl.parallel import terminal
from megarl.submission.jobs import Request, prepare
from megarl.submission.queue import dry_run, submit_all
from megarl.submission.resources import Resources, nodes_for
from megarl.submission.sweep import parse_sweep
from megarl.train import admission

Nodes = Annotated[
    int | None, typer.Option("--nodes", help="Nodes of the run; default: as many as gpus of CONFIG fill.")
]
GpusPerNode = Annotated[
    int | None,
    typer.Option("--gpus-per-node", help="GPUs of a node, 0 for a run on CPUs; default: the --cluster's."),
]
TasksPerNode = Annotated[
    int | None,
    typer.Option("--tasks-per-node", help="Processes of a node without GPUs; default: 1. With GPUs each has one."),
]
CpusPerTask = Annotated[
    int | None,
    typer.Option("--cpus-per-task", help="Cores of a process; default: a GPU's share of its node, or 1 without any."),
]
Time = Annotated[
    str | None, typer.Option("--time", help="Time limit in Slurm's form, such as 4:00:00; default: the cluster's.")
]
PartitionName = Annotated[str | None, typer.Option("--partition", help="Partition; default: the cluster's.")]
Account = Annotated[str | None, typer.Option("--account", help="Account to charge; default: the user's.")]
ClusterName = Annotated[
    str, typer.Option("--cluster", help="GPUs to rehearse for: a name in configs/clusters/, or a YAML file.")
]
Array = Annotated[
    str | None,
    typer.Option(
        "--array",
        metavar="KEY=LIST",
        help="A job array, a run for each value: seeds=0..4, optimizer.lr=1e-6,2e-6. Runs are called NAME-seed0 etc.",
    ),
]
Then = Annotated[
    list[str] | None,
    typer.Option(
        "--then",
        metavar="JOB",
        help="A job after the one before has succeeded: evaluate or convert, with arguments in the same quotes, and "
        "--sbatch=OPTION for what is its own. "
        "Repeatable.",
    ),
]
Others = Annotated[
    list[str] | None,
    typer.Option("--sbatch", metavar="OPTION", help="A further option of sbatch: --sbatch=--qos=high. Repeatable."),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Check all and print the scripts on stdout; submit and write nothing. Slurm is asked (sbatch --test-only) "
        "where it is there; files that are missing are only named.",
    ),
]


def submit(
    config: ConfigPath,
    overrides: Overrides = None,
    nodes: Nodes = None,
    gpus_per_node: GpusPerNode = None,
    tasks_per_node: TasksPerNode = None,
    cpus_per_task: CpusPerTask = None,
    time: Time = None,
    partition: PartitionName = None,
    account: Account = None,
    cluster: ClusterName = "h100",
    array: Array = None,
    then: Then = None,
    sbatch: Others = None,
    dry: DryRun = False,
) -> None:
    """Check the run of CONFIG for its nodes, write its Slurm script from slurm/train.sbatch, and submit it.

    What cannot run is refused here, with code 2, before it waits in the queue: a broken rule, a missing file, a phase
    that does not fit the GPUs' memory, a partition or a time limit that is not possible. Scripts and logs are kept in
    runs/NAME/jobs/. A run of that name that is there already is continued (resume=auto), unless resume is given.
    """
    machines = read_cluster(cluster)
    gpus = machines.gpus_per_node if gpus_per_node is None else gpus_per_node
    if nodes is None:
        nodes, gpus = nodes_for(load_config(config, overrides or ()).gpus, gpus)
    tasks = tasks_per_node if tasks_per_node is not None else max(gpus, 1)
    request = Request(
        config=config,
        overrides=tuple(overrides or ()),
        resources=Resources(nodes, tasks, gpus, cpus_per_task, time, partition, account, tuple(sbatch or ())),
        cluster=machines,
        sweep=None if array is None else parse_sweep(array),
        following=tuple(then or ()),
        command=shlex.join(["megarl", *sys.argv[1:]]),
    )

    prepared = prepare(request, terminal.say, admission.contents, dry=dry)
    if dry:
        dry_run(prepared, sys.stdout, terminal.say)
    else:
        submit_all(prepared, sys.stdout, terminal.say)
