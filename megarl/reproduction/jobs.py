"""A row as Slurm jobs, each waiting for the one before: conversion, training, evaluation; what is done has none."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TextIO

from megarl.config.cluster import Cluster
from megarl.config.schema import RunConfig
from megarl.errors import Refusal
from megarl.reproduction import stages
from megarl.reproduction.chain import Say, require_inputs
from megarl.reproduction.inputs import absent_start, how_to_start, missing
from megarl.reproduction.rows import Row
from megarl.submission.jobs import Request, prepare
from megarl.submission.queue import dry_run, submit_all
from megarl.submission.resources import Resources, nodes_for

Contents = Callable[[RunConfig], Iterable[Refusal]]


@dataclass(frozen=True)
class Wanted:
    """What the jobs ask Slurm for beside the rows' GPUs."""

    cluster: Cluster
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    others: tuple[str, ...] = ()


def submit(rows: Sequence[Row], wanted: Wanted, contents: Contents, say: Say, stream: TextIO, *, dry: bool) -> None:
    """Submit what is left of the rows; `dry` prints the scripts and leaves all as it is.

    A row that begins with another's end is left for later until that is there. Raises `Refusal` as `megarl submit`.
    """
    for row in rows:
        request = request_of(row, wanted)
        if request is None:
            say(f"{row.name}: everything is done; `megarl reproduce {row.name}` prints the table")
            continue
        if not stages.is_trained(row) and (why := absent_start(row)) is not None:
            rule = f"begins with the end of {row.start}, and {why}"
            refusal = Refusal(row.name, rule, f"first {how_to_start(row)}; then submit it")
            if len(rows) == 1:
                raise refusal
            say(f"left for later: {refusal}")
            continue
        if not dry:
            _bring(row, say)
        prepared = prepare(request, say, contents, dry=dry)
        if dry:
            dry_run(prepared, stream, say)
        else:
            submit_all(prepared, stream, say)


def request_of(row: Row, wanted: Wanted) -> Request | None:
    """What `megarl submit` would be asked for, None where nothing is left. Raises `Refusal` for a row without GPUs."""
    gpus = row.config.gpus
    if gpus is None:
        raise Refusal(row.name, "names no GPUs, and needs no cluster", f"run it here: megarl reproduce {row.name}")
    nodes, of_a_node = nodes_for(gpus, wanted.cluster.gpus_per_node)
    trained = stages.is_trained(row)
    conversion = stages.conversion_stage(row)
    conversions = conversion.commands if conversion is not None and conversion.done is None else ()
    evaluates = stages.evaluation_stage(row).done is None
    if trained and not evaluates:
        return None
    settings = [text for text in stages.settings(row) if text.startswith("model.")]
    suites = ["evaluate", f"--suite={','.join(row.about.suites)}", *row.about.suite_settings]
    return Request(
        config=row.path,
        overrides=(),
        resources=Resources(
            nodes, of_a_node, of_a_node, None, wanted.time, wanted.partition, wanted.account, wanted.others
        ),
        cluster=wanted.cluster,
        before=tuple(shlex.join(["convert", *command.arguments]) for command in conversions),
        made=tuple(settings),
        trains=not trained,
        following=(shlex.join(suites),) if evaluates else (),
        command=shlex.join(["megarl", *sys.argv[1:]]),
    )


def _bring(row: Row, say: Say) -> None:
    """Make the files that come over no network; others must be there."""
    require_inputs(row, say)
    for one in missing(row) if not stages.is_trained(row) else []:
        one.command.run()
