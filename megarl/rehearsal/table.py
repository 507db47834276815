"""A report as a person reads it. Torch-free."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TextIO, get_args

from rich import box
from rich.console import Console
from rich.table import Table

from megarl.config.cluster import GIB
from megarl.rehearsal.report import Amount, PhaseMemory, PhaseName, PushTraffic, Report

PHASES: tuple[PhaseName, ...] = get_args(PhaseName)


def print_report(report: Report, stream: TextIO | None = None) -> None:
    """Print parameters, the memory of each phase's busiest stage, of all stages, the cache, the host, the verdict."""
    console = Console(file=stream or sys.stdout, highlight=False, width=120)
    layout = ", ".join(f"{name} {size}" for name, size in report.layout.items() if size > 1) or "no parallelism"
    console.print(f"[bold]{report.name}[/bold] on {report.processes} GPUs: {layout}")
    work = report.work
    console.print(
        f"an update of a replica: {work.sequences:,} sequences in {work.micro_batches:,} micro-batches of "
        f"{work.tokens_per_microbatch:,} tokens, if all are the longest"
    )
    parameters = report.parameters
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in parameters.by_kind.items())
    console.print(
        f"\n[bold]Parameters[/bold]: {parameters.exact:,} by config.json, {parameters.counted:,} in the shards, each "
        f"once\n  {kinds}"
    )
    console.print(_phase_table(report))
    console.print("  [dim]* by a formula or an assumption; all others are counted[/dim]")
    if report.layout["pipeline"] > 1:
        console.print(_stage_table(report))
    cache = report.kv_cache
    if cache is not None:
        console.print(
            f"[bold]KV cache[/bold]: {cache.tokens:,} tokens of {cache.bytes_per_token:,} bytes on a GPU, "
            f"{cache.sequences:,} sequences of {cache.sequence_tokens:,} tokens at once"
        )
    if report.push is not None:
        console.print(_push_table(report.push))
    host = ", ".join(f"{amount.kind} {_gib(amount.bytes)}" for amount in report.host.amounts) or "nothing"
    console.print(f"[bold]Host[/bold] of a node: {_gib(report.host.used)} of {_gib(report.host.limit)} GiB ({host})")
    hours = report.hours
    whole = "" if hours.gpu_hours is None else f", {hours.gpu_hours:,.0f} GPU-hours in {hours.steps:,} steps"
    console.print(
        f"[bold]Time[/bold] *: {hours.generate:,.0f} s a step to generate, {hours.train:,.0f} s to train{whole}"
    )
    for note in report.notes:
        console.print(f"[yellow]Note[/yellow]: {note}", soft_wrap=True)
    colour = "green" if report.fits else "red"
    console.print(f"\n[bold {colour}]{report.verdict}[/bold {colour}]", soft_wrap=True)


def _phase_table(report: Report) -> Table:
    """One column per phase: its busiest stage, by kind."""
    busiest = [one for one in map(report.busiest, PHASES) if one is not None]
    table = Table("GiB of a GPU", title="Memory of the busiest stage", title_justify="left", box=box.SIMPLE_HEAD)
    for phase in busiest:
        stage = f"\nstage {phase.stage}" if report.layout["pipeline"] > 1 else ""
        table.add_column(f"{phase.phase}{stage}", justify="right")
    for kind in _kinds(busiest):
        table.add_row(kind, *(_cell([a for a in phase.amounts if a.kind == kind]) for phase in busiest))
    table.add_section()
    table.add_row("used", *(_gib(phase.used) for phase in busiest))
    table.add_row("there", *(_gib(phase.limit) for phase in busiest))
    table.add_row("left", *(_gib(phase.margin) for phase in busiest), style="bold")
    return table


def _stage_table(report: Report) -> Table:
    """One row per pipeline stage: layers, parameters, and what each phase uses."""
    present = [phase for phase in PHASES if report.busiest(phase) is not None]
    table = Table("stage", title="All stages, GiB used", title_justify="left", box=box.SIMPLE_HEAD)
    for name in ("layers", "parameters", *present):
        table.add_column(name, justify="right")
    of_stage = {stage: one for one in report.parameters.stages for stage in one.stages}
    used = {(one.phase, one.stage): one.used for one in report.phases}
    for stage, one in sorted(of_stage.items()):
        cells = [_gib(used[phase, stage]) for phase in present]
        table.add_row(str(stage), str(one.layers), f"{one.total:,}", *cells)
    return table


def _push_table(push: PushTraffic) -> Table:
    """The links of a push, and what it comes to."""
    least = push.lower_bound_max_rank / push.received_bytes_max_rank if push.received_bytes_max_rank else 1.0
    table = Table(
        "GB",
        title=f"Weight push: {push.seconds:.2f} s by the links' speeds *",
        caption=f"most received by a rank {_gb(push.received_bytes_max_rank)}, of which it needs and lacks "
        f"{least:.0%}; a push that gathers puts {_gb(push.gathered_bytes)} together on every rank\n"
        f"rank {push.slowest_rank}, the slowest: {push.messages:,} messages in {push.rounds:,} rounds",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for name in ("all ranks", "most into a rank", "most out of a rank"):
        table.add_column(name, justify="right")
    for name, link in (("between nodes", push.network), ("within nodes", push.nvlink)):
        table.add_row(name, _gb(link.total), _gb(link.most_received), _gb(link.most_sent))
    table.add_row("within ranks", _gb(push.copied_bytes), "-", "-")
    return table


def _kinds(phases: Iterable[PhaseMemory]) -> list[str]:
    """All kinds in the order in which they appear, what is reserved last."""
    kinds = dict.fromkeys(amount.kind for phase in phases for amount in phase.amounts)
    return sorted(kinds, key=lambda kind: kind == "reserved")


def _cell(amounts: list[Amount]) -> str:
    return "".join(f"{_gib(amount.bytes)}{'' if amount.counted else ' *'}" for amount in amounts) or "-"


def _gb(size: int) -> str:
    return f"{size / 1e9:,.2f}"


def _gib(size: int) -> str:
    return f"{size / GIB:,.2f}"
