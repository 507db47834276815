"""The end of a submission: scripts printed, or kept beside the run and handed to Slurm in their order."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from megarl.errors import MegarlError
from megarl.submission import slurm
from megarl.submission.jobs import Prepared


def dry_run(prepared: Prepared, stream: TextIO, say: Callable[[str], None]) -> None:
    """Print the scripts; nothing is written. Of several all but the first follow a line that names them."""
    if prepared.verdict is not None:
        say(prepared.verdict)
    for index, job in enumerate(prepared.jobs):
        if index:
            say(f"{job.kind} would start when {prepared.jobs[index - 1].kind} has succeeded ({_kind(prepared)})")
            print(f"\n#### {job.kind}", file=stream)
        print(job.script, end="", file=stream)
    say("nothing was submitted or written")


def submit_all(prepared: Prepared, stream: TextIO, say: Callable[[str], None]) -> list[str]:
    """Keep the scripts in the run's folder, submit them, and print what to know of them. Returns the jobs' numbers.

    Raises `Refusal` or `NoAnswer` where Slurm does not take one; the jobs before it stay in the queue, and are named.
    """
    if prepared.verdict is not None:
        say(prepared.verdict)
    numbers: list[str] = []
    for job, path in zip(prepared.jobs, keep(prepared), strict=True):
        dependency = f"{_kind(prepared)}:{numbers[-1]}" if numbers else None
        try:
            number = slurm.submit(path, job.resources, dependency)
        except MegarlError:
            if numbers:
                say(f"in the queue already: {', '.join(numbers)}; to take them out: scancel {' '.join(numbers)}")
            raise
        numbers.append(number)
        after = f", after {numbers[-2]}" if len(numbers) > 1 else ""
        print(f"{job.kind}: job {number}{after}, script {path}", file=stream)
        print(f"  log {_log(job.log, number)}; each rank's in {_ranks(job.log, number)}", file=stream)
    print(f"watch:  squeue --jobs={','.join(numbers)}; tail -F {_log(prepared.jobs[0].log, numbers[0])}", file=stream)
    print(f"cancel: scancel {' '.join(numbers)}", file=stream)
    return numbers


def keep(prepared: Prepared) -> list[Path]:
    """Write the scripts as NNN-KIND.sbatch under the next number that is free; none is ever overwritten."""
    prepared.folder.mkdir(parents=True, exist_ok=True)
    taken = (re.match(r"(\d+)-", file.name) for file in prepared.folder.iterdir())
    number = max((int(match[1]) for match in taken if match), default=0) + 1
    paths: list[Path] = []
    while not paths:
        try:
            first = prepared.jobs[0]
            paths = [_write(prepared.folder / f"{number:03d}-{first.kind}.sbatch", first.script)]
        except FileExistsError:
            # Another submission of this run was quicker.
            number += 1
    for index, job in enumerate(prepared.jobs[1:], start=2):
        paths.append(_write(prepared.folder / f"{number:03d}-{index}-{job.kind}.sbatch", job.script))
    return paths


def _write(path: Path, text: str) -> Path:
    with open(path, "x", encoding="utf-8") as file:
        file.write(text)
    return path


def _kind(prepared: Prepared) -> str:
    """How a job waits for the one before; a task of an array for the task of its own index."""
    return "aftercorr" if prepared.is_array else "afterok"


def _log(log: str, number: str) -> str:
    """The log of job `number`; of an array, a pattern that the shell expands to all tasks' logs."""
    return log.replace("%j", number).replace("%A_%a", f"{number}_*")


def _ranks(log: str, number: str) -> str:
    """The folder of the ranks' logs, which `script.filled_in` names."""
    return f"{_log(log, number).removesuffix('.log')}/"
