"""`megarl doctor [RUN_DIR]`: what is installed and what that costs, or what a run can be resumed from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from megarl.errors import Refusal
from megarl.formats import checkpoint_folder
from megarl.parallel import terminal

RunFolder = Annotated[
    Path | None, typer.Argument(metavar="[RUN_DIR]", help="A run's folder; none: the installation.", show_default=False)
]
SizesOnly = Annotated[bool, typer.Option("--sizes", help="Look at the files' sizes alone, not at every byte.")]


def doctor(run_dir: RunFolder = None, sizes: SizesOnly = False) -> None:
    """Say what is installed and what the missing parts cost; or what the run in RUN_DIR can be resumed from."""
    console = Console(highlight=False, width=120)
    if run_dir is None:
        _show_installation(console)
    else:
        _show_run(console, run_dir, every_byte=not sizes)


def _show_installation(console: Console) -> None:
    from megarl.train.installation import facts

    table = Table("part", "found", "what it means", box=box.SIMPLE_HEAD)
    for fact in facts():
        table.add_row(fact.name, fact.found or "[yellow]missing[/yellow]", fact.meaning)
    console.print(table)


def _show_run(console: Console, run_dir: Path, *, every_byte: bool) -> None:
    """The run's checkpoints, and the one from which `resume=auto` would go on. Raises `Refusal` where that would."""
    if not run_dir.is_dir():
        raise Refusal(str(run_dir), "is no folder", "give a run's folder, such as runs/NAME")
    found = checkpoint_folder.survey(run_dir)
    table = Table("checkpoint", "step", "optimizer", "state", box=box.SIMPLE_HEAD)
    damaged: dict[Path, str] = {}
    for directory, known in found:
        damage = known
        if damage is None and every_byte:
            terminal.say(f"reading {directory.name}")
            damage = checkpoint_folder.altered(directory) or _not_finite(directory)
        if damage is not None:
            damaged[directory] = damage
        progress = {} if known else checkpoint_folder.read_progress(directory)
        optimizer = "?" if known else "yes" if progress["optimizer"] else "no"
        state = f"[red]damaged: it {damage}[/red]" if damage else "[green]whole[/green]"
        table.add_row(directory.name, str(progress.get("step", "?")), optimizer, state)
    if found:
        console.print(table)
    chosen = checkpoint_folder.find(run_dir, damaged)
    if chosen is None:
        console.print(f"{run_dir} has no finished checkpoint: a run there starts from the beginning")
        return
    checkpoint_folder.check_resumable(chosen, checkpoint_folder.read_progress(chosen))
    console.print(f"resume=auto or must continues from {chosen}", soft_wrap=True)


def _not_finite(directory: Path) -> str | None:
    """What of a whole checkpoint is no number, in words; None where all is."""
    from megarl.formats.megatron import DistributedCheckpoint

    try:
        key = DistributedCheckpoint(directory).first_not_finite()
    except Refusal as error:
        return f"holds what {error.rule}"
    return None if key is None else f"was saved by a run that had diverged: {key} is not finite"
