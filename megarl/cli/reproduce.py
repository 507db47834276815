"""`megarl reproduce [NAME] [--dry-run | --submit] [options]`: from a row of a published table to its verdict."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from megarl.cli.submit import Account, ClusterName, Others, PartitionName, Time
from megarl.config.cluster import read_cluster
from megarl.errors import Refusal
from megarl.parallel import terminal
from megarl.reproduction import chain, jobs, listing, rows
from megarl.train import admission

Name = Annotated[
    str | None,
    typer.Argument(
        metavar="[NAME]",
        help="A row or a table of configs/reproduce/, or a row's YAML file; none: list all rows.",
        show_default=False,
    ),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Print what is done and the commands of what is not; with --submit the scripts."),
]
Submit = Annotated[
    bool, typer.Option("--submit", help="Hand what is left to Slurm: jobs, each waiting for the one before.")
]


def reproduce(
    name: Name = None,
    dry: DryRun = False,
    submit: Submit = False,
    cluster: ClusterName = "h100",
    time: Time = None,
    partition: PartitionName = None,
    account: Account = None,
    sbatch: Others = None,
) -> None:
    """Reproduce NAME: check its model and data, convert, train, evaluate, and print paper, measured and difference.

    What is done already, whoever did it, is not done again. Where a model or data must be fetched, the command that
    does it is said. Without NAME all rows are listed, with size, GPUs, estimated GPU-hours, and state.
    """
    machines = read_cluster(cluster)
    if not submit:
        options = {"--time": time, "--partition": partition, "--account": account, "--sbatch": sbatch}
        for option, value in options.items():
            if value:
                raise Refusal(f"{option}", "is for Slurm", "add --submit, or remove it")
    if name is None:
        if dry or submit:
            raise Refusal("--submit" if submit else "--dry-run", "needs a NAME", "give a row or a table, as listed")
        listing.print_rows(rows.all_rows(), machines, sys.stdout)
        return
    chosen = rows.find(name)
    if submit:
        wanted = jobs.Wanted(machines, time, partition, account, tuple(sbatch or ()))
        jobs.submit(chosen, wanted, admission.contents, terminal.say, sys.stdout, dry=dry)
    elif dry:
        chain.describe(chosen, sys.stdout)
    else:
        chain.carry_out(chosen, terminal.say, sys.stdout)
