"""What a run says while it goes: a line per step and evaluation; on a terminal, a bar over the steps below them.

In a log a line is as long as it is; on a terminal a step's line is shortened to the width. Neither is wrapped.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column
from rich.text import Text

from megarl.report.figures import clock_time, problems, rate

#: Steps that the time left is estimated from, evaluations and saves between them included.
RECENT = 20


class Display:
    """A live bar on a terminal; plain lines where output goes to a file."""

    def __init__(self, name: str, steps: int, *, enabled: bool, console: Console | None = None) -> None:
        self._enabled, self._steps = enabled, steps
        self._console = console or Console(file=sys.stderr, highlight=False)
        self._live = enabled and self._console.is_terminal
        self._pace = Pace()
        self._progress = Progress(
            TextColumn("[bold]{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis")),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[phase]:<12}", table_column=Column(no_wrap=True, overflow="ellipsis")),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=self._console,
            disable=not self._live,
        )
        self._task = self._progress.add_task(name, total=steps, phase="starting", left="")
        if self._live:
            self._progress.start()

    def begin(self, finished: int) -> None:
        """The run goes on after step `finished`."""
        self._progress.update(self._task, completed=finished)

    def status(self, text: str) -> None:
        """Say what is being done before and after the steps."""
        if self._enabled:
            # As text: brackets in it are no styles.
            self._console.print(Text(text), soft_wrap=not self._live)

    def phase(self, name: str) -> None:
        """Show the phase of the current step."""
        if self._live:
            self._progress.update(self._task, phase=name)

    def step(self, values: dict[str, Any]) -> None:
        """Show a finished step's main numbers."""
        if not self._enabled:
            return
        seconds = sum(values.get("seconds", {}).values())
        self._pace.step_ends(time.monotonic(), seconds)
        left = self._pace.per_step * (self._steps - values["step"])
        self._show(step_parts(values, self._steps, left))
        if self._live:
            self._progress.update(self._task, completed=values["step"], left=f"{clock_time(left)} left")

    def evaluation(self, values: dict[str, Any]) -> None:
        """Show an evaluation's main numbers."""
        if self._enabled:
            self._show(evaluation_parts(values, self._steps))

    def _show(self, parts: list[str]) -> None:
        """One line of parts, of which a terminal that is too narrow shows the first."""
        if not self._live:
            self._console.print(Text("  ".join(parts)), soft_wrap=True)
            return
        while len(parts) > 1 and len("  ".join(parts)) > self._console.width:
            parts = parts[:-1]
        self._console.print(Text("  ".join(parts)), no_wrap=True, overflow="ellipsis", crop=True)

    def close(self) -> None:
        """Take the bar down."""
        if self._live:
            self._progress.stop()


class Pace:
    """Seconds from one step's end to the next one's, in the mean over the last `RECENT`."""

    def __init__(self) -> None:
        self._ends: deque[float] = deque(maxlen=RECENT + 1)
        self._steps = 0

    def step_ends(self, now: float, seconds: float) -> None:
        """A step that took `seconds` ended at `now`."""
        if self._steps == 0:
            self._ends.append(now - seconds)
        elif self._steps == 1:
            # The first step warms up too: it counts only while it is the only one.
            self._ends.popleft()
        self._ends.append(now)
        self._steps += 1

    @property
    def per_step(self) -> float:
        """0 before the first step."""
        return (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1) if self._ends else 0.0


#: A step's numbers that a line shows, in order of their weight: name there, name in metrics.jsonl.
_OF_STEPS = (
    ("reward", "reward_mean"),
    ("loss", "loss"),
    ("grad", "grad_norm"),
    ("kl", "reference_kl"),
    ("gap", "logprob_gap_mean"),
    ("length", "response_length_mean"),
)
_OF_EVALUATIONS = (
    ("cross-accuracy", "cross_accuracy"),
    ("reward", "evaluation_reward_mean"),
    ("length", "evaluation_length_mean"),
    ("truncated", "evaluation_truncated_share"),
)


def step_parts(values: dict[str, Any], steps: int, left: float) -> list[str]:
    """A step's line in parts, what matters most first; `left` is the time left in seconds."""
    parts = [_counted(values["step"], steps), *_numbers(values, _OF_STEPS)]
    if values["step"] < steps:
        parts.append(f"{clock_time(left)} left")
    if values.get("epoch") is not None:
        parts.append(f"epoch {values['epoch']:.2f}")
    parts.append(_seconds(values))
    if (speed := rate(values)) is not None:
        parts.append(f"{speed:.0f} tokens/s")
    return parts


def evaluation_parts(values: dict[str, Any], steps: int) -> list[str]:
    """An evaluation's line in parts."""
    accuracy = values.get("accuracy")
    found = "no answer has a reward" if accuracy is None else f"accuracy {accuracy:.4g}"
    parts = [_counted(values["step"], steps), f"{found} on {problems(values)}", *_numbers(values, _OF_EVALUATIONS)]
    return [*parts, _seconds(values)]


def _seconds(values: dict[str, Any]) -> str:
    seconds = sum(values.get("seconds", {}).values())
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds:.2g} s"


def _counted(step: int, steps: int) -> str:
    total = str(steps)
    return f"step {step:>{len(total)}}/{total}"


def _numbers(values: dict[str, Any], names: Iterable[tuple[str, str]]) -> list[str]:
    return [f"{shown} {values[name]:.4g}" for shown, name in names if values.get(name) is not None]
