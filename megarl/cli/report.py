"""`megarl report RUN_DIR [RUN_DIR ...]`: what runs have recorded, as one HTML page."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from megarl.errors import Refusal
from megarl.parallel import terminal
from megarl.report import page

RunFolders = Annotated[
    list[Path], typer.Argument(metavar="RUN_DIR [RUN_DIR ...]", help="Folders of runs, shown beside each other.")
]
Out = Annotated[
    Path | None,
    typer.Option("--out", help="File to write; default: report.html in the run's folder, of several in the one above."),
]
Follow = Annotated[bool, typer.Option("--follow", help="Write it again as the runs go on, until they have ended.")]
Every = Annotated[float, typer.Option("--every", help="With --follow: seconds between two looks at the runs.")]


def report(run_dirs: RunFolders, out: Out = None, follow: Follow = False, every: Every = 10.0) -> None:
    """Write one page of the runs in RUN_DIR ...: curves, where time and memory went, samples, settings.

    The page is one file that needs no network: open it, send it, keep it.
    """
    if every <= 0:
        raise Refusal(f"--every {every:g}", "must be more than 0 seconds", "give some seconds, such as 10")
    file = out or _beside(run_dirs)
    if follow:
        try:
            page.follow(run_dirs, file, every, terminal.say)
        except KeyboardInterrupt:
            # It is how somebody ends this; what is written stays, without loading itself again.
            terminal.say(page.write_page(run_dirs, file).sentence())
        return
    written = page.write_page(run_dirs, file)
    for remark in written.remarks:
        terminal.say(remark)
    print(written.sentence())


def _beside(run_dirs: list[Path]) -> Path:
    if len(run_dirs) == 1:
        return run_dirs[0] / "report.html"
    return Path(os.path.commonpath([directory.absolute().parent for directory in run_dirs])) / "report.html"
