"""Progress on the terminal: a bar over steps with the current phase, and a line per step in a log file."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Display:
    """A live bar on a terminal; plain lines where output goes to a file."""

    def __init__(self, name: str, steps: int, *, enabled: bool) -> None:
        self._enabled = enabled
        self._console = Console(file=sys.stderr, highlight=False)
        self._live = enabled and self._console.is_terminal
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[phase]:<12}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._live,
        )
        self._task = self._progress.add_task(name, total=steps, phase="starting")
        if self._live:
            self._progress.start()

    def status(self, text: str) -> None:
        """Say what is being done before and after the steps."""
        if not self._enabled:
            return
        if self._live:
            self._progress.update(self._task, phase=text)
        else:
            self._console.print(text)

    def phase(self, name: str) -> None:
        """Show the phase of the current step."""
        if self._live:
            self._progress.update(self._task, phase=name)

    def step(self, values: dict[str, Any]) -> None:
        """Show a finished step's (or an evaluation's) main numbers."""
        if not self._enabled:
            return
        shown = {
            "reward": values.get("reward_mean"),
            "accuracy": values.get("accuracy"),
            "loss": values.get("loss"),
            "grad": values.get("grad_norm"),
            "length": values.get("response_length_mean"),
            "gap": values.get("logprob_gap_mean"),
        }
        seconds = sum(values.get("seconds", {}).values())
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in shown.items() if value is not None)
        self._console.print(f"step {values['step']:>4}  {numbers}  {seconds:.1f} s")
        if self._live and "loss" in values:
            self._progress.update(self._task, completed=values["step"])

    def close(self) -> None:
        """Take the bar down."""
        if self._live:
            self._progress.stop()
