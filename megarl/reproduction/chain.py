"""A row from its inputs to its verdict: what is to be done, done here, or handed to Slurm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from megarl.errors import Refusal
from megarl.reproduction import stages, verdict
from megarl.reproduction.commands import megarl_command
from megarl.reproduction.inputs import Missing, absent_start, how_to_start, missing
from megarl.reproduction.rows import Row

Say = Callable[[str], None]
#: Files of the GPUs that a machine has, as the driver makes them.
_GPUS = Path("/dev")


def describe(rows: Sequence[Row], stream: TextIO) -> None:
    """Print every stage of the rows: what is done, and the commands of what is not, each once."""
    names, said = {row.name for row in rows}, set[str]()
    for row in rows:
        print(f"{row.name}: {row.about.row} ({row.about.source})", file=stream)
        if row.start not in names and (why := _waits(row)) is not None:
            print(f"  start     first {how_to_start(row)}: {why}", file=stream)
        for stage in filter(None, (look(row) for look in stages.STAGES)):
            if stage.done is not None:
                print(f"  {stage.name:<9} done: {stage.done}", file=stream)
            for command in map(str, stage.commands if stage.done is None else ()):
                if command not in said:
                    print(f"  {stage.name:<9} {command}", file=stream)
                said.add(command)
        print("  table     paper, measured, difference", file=stream)


def carry_out(rows: Sequence[Row], say: Say, stream: TextIO) -> None:
    """Do what is left of every row here, in order, and print one table of them.

    Files that come over no network are made; others are asked for. Raises `Refusal` for what is missing, and what a
    stage's command ended with.
    """
    names = {row.name for row in rows}
    for row in rows:
        _check(row, say)
        if row.start not in names and not stages.is_trained(row):
            _require_start(row)
    found: dict[str, verdict.Verdict] = {}
    for row in rows:
        _finish(row, say)
        if row.about.suites:
            found[row.name] = verdict.judge(row.about, stages.results(row))
            verdict.keep(row, found[row.name])
    if found:
        verdict.print_verdicts(found, stream)
    _show(rows, say)


def _finish(row: Row, say: Say) -> None:
    """Do what is left of a row's stages, each looked at when the ones before it are done."""
    for look in stages.STAGES:
        stage = look(row)
        if stage is None:
            continue
        if stage.done is not None:
            say(f"{row.name}, {stage.name}: {stage.done}")
            continue
        if look is stages.training_stage:
            _require_start(row)
        for command in stage.commands:
            say(f"{row.name}, {stage.name}: {command}")
            command.run()


def shown_together(rows: Sequence[Row]) -> list[Row]:
    """Those of whose ends no other of them begins: a warm-up's steps are none to compare with its successors'."""
    starts = {row.start for row in rows}
    return [row for row in rows if row.name not in starts]


def _show(rows: Sequence[Row], say: Say) -> None:
    """One page of the rows' runs: of several beside their folders, by their table's name."""
    page = rows[0].folder / "report.html" if len(rows) == 1 else rows[0].folder.with_name(f"{rows[0].about.table}.html")
    command = megarl_command("report", *(str(row.folder) for row in shown_together(rows)), "--out", str(page))
    say(str(command))
    command.run()


def require_inputs(row: Row, say: Say) -> None:
    """Raise `Refusal` for the first input that must be fetched; of several each is said, with its command."""
    lacking = [one for one in missing(row) if one.fetches] if not stages.is_trained(row) else []
    for one in lacking[1:]:
        say(str(_refusal(row, one)))
    if lacking:
        raise _refusal(row, lacking[0])


def _check(row: Row, say: Say) -> None:
    """What would end the chain later and can be known now."""
    require_inputs(row, say)
    needed = row.config.gpus
    if needed is None or stages.training_stage(row).done is not None:
        return
    there = len([file for file in _GPUS.glob("nvidia[0-9]*") if file.name.removeprefix("nvidia").isdigit()])
    if there < needed:
        rule = f"is written for {needed} GPUs, and this machine has {there}"
        raise Refusal(row.name, rule, "use --submit on a cluster's login node, or --dry-run")


def _require_start(row: Row) -> None:
    if (why := absent_start(row)) is not None:
        rule = f"begins with the end of {row.start}, and {why}"
        raise Refusal(row.name, rule, f"first {how_to_start(row)}")


def _waits(row: Row) -> str | None:
    return None if stages.is_trained(row) else absent_start(row)


def _refusal(row: Row, one: Missing) -> Refusal:
    return Refusal(f"{row.name} without {one.path}", one.rule, f"fetch it: {one.command}")
