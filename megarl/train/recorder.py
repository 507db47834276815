"""What a run leaves behind: metrics, samples and phases (.jsonl), trackers, summary.json, curves.png, report.html; and
the terminal.

Only rank 0 writes; on other ranks every method does nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megarl.config.schema import RunConfig
from megarl.parallel import terminal
from megarl.report.curves import draw_curves
from megarl.report.page import write_page
from megarl.train.display import Display
from megarl.train.ending import first_and_last, sentences
from megarl.train.past import keep_configuration
from megarl.train.trackers import Tracker, trackers


class Recorder:
    """Writes the files of one run directory."""

    def __init__(self, config: RunConfig, writes: bool, *, show: bool) -> None:
        self.config = config
        self.directory = Path(config.runs_dir) / config.name
        self._writes = writes
        self.display = Display(config.name, config.steps, enabled=show)
        self._trackers: list[Tracker] = []
        self._untold: list[dict[str, Any]] = []
        self._failures_told: set[str] = set()

    def open(self, finished: int | None = None) -> None:
        """Start recording, after step `finished` where the run continues: what came after that is removed.

        None begins anew: nothing that an earlier run of this name recorded is kept.
        """
        if not self._writes:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        keep_configuration(self.config, finished or 0)
        for name in ("metrics.jsonl", "samples.jsonl", "phases.jsonl"):
            _keep_lines_of(self.directory / name, finished, self.config.steps)
        for file in self.directory.glob("evaluations/step_*.jsonl"):
            if finished is None or int(file.stem.removeprefix("step_")) > finished:
                file.unlink()
        self._trackers = trackers(self.config, self.directory, finished)
        self.display.begin(finished or 0)

    def status(self, text: str) -> None:
        """Say on the terminal what is being done."""
        self.display.status(text)

    def failure(self, failure: str | None, of: str = "reward") -> None:
        """Say once how the reward, or something else, failed on an answer, where it did."""
        if failure is None or of in self._failures_told:
            return
        self._failures_told.add(of)
        if self._writes:
            terminal.say(f"{failure}; such answers are counted in metrics.jsonl, and this is said once")

    def phase(self, name: str) -> None:
        """Say on the terminal which phase the step is in."""
        self.display.phase(name)

    def step(self, values: dict[str, Any]) -> None:
        """Append one step's line."""
        self._record(values)
        self.display.step(values)

    def evaluation(self, values: dict[str, Any]) -> None:
        """Append an evaluation's line."""
        self._record(values)
        self.display.evaluation(values)

    def _record(self, values: dict[str, Any]) -> None:
        if not self._writes:
            return
        self._append("metrics.jsonl", [_null_where_not_finite(values)])
        for tracker in self._trackers:
            tracker.numbers(values)

    def samples(self, rows: Sequence[dict[str, Any]]) -> None:
        """Append samples (`megarl.train.shown`)."""
        if not self._writes or not rows:
            return
        self._append("samples.jsonl", rows)
        # What a table can show.
        self._untold += [{name: value for name, value in row.items() if name != "pieces"} for row in rows]

    def phases(self, line: dict[str, Any]) -> None:
        """Append where the ranks' time went (`megarl.train.timeline`), of which the trackers get what is of no rank."""
        if not self._writes:
            return
        self._append("phases.jsonl", [line])
        numbers = {name: line[name] for name in ("slowest", "fastest", "push_seconds")}
        for tracker in self._trackers:
            tracker.numbers({"step": line["step"], f"{line['kind']}_phases": numbers})

    def _append(self, name: str, rows: Sequence[dict[str, Any]]) -> None:
        with open(self.directory / name, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    def answers_file(self, name: str) -> Path:
        """The file with the answers of the evaluation `name`."""
        return self.directory / "evaluations" / f"{name}.jsonl"

    def answers(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Write the answers of an evaluation, in place of those of an earlier one of that name."""
        if not self._writes:
            return
        file = self.answers_file(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(file.name + ".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        partial.replace(file)

    def curves(self) -> None:
        """Redraw curves.png from metrics.jsonl, and give the trackers the samples since the last time."""
        if not self._writes:
            return
        draw_curves(self._lines(), self.directory / "curves.png", self.config.name)
        self._tell_samples()

    def _tell_samples(self) -> None:
        rows, self._untold = self._untold, []
        for tracker in self._trackers if rows else ():
            tracker.samples(rows)

    def finish(self, summary: dict[str, Any]) -> dict[str, Any]:
        """Leave what a whole run leaves, say so, and return the summary with what the recorded lines add to it."""
        if not self._writes:
            return summary
        self.curves()
        lines = self._lines()
        summary = summary | first_and_last(lines)
        partial = self.directory / "summary.json.partial"
        partial.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        partial.replace(self.directory / "summary.json")
        write_page([self.directory], self.directory / "report.html")
        for sentence in sentences(summary, lines, self.directory):
            self.display.status(sentence)
        for tracker in self._trackers:
            self.display.status(f"  {type(tracker).__name__.lower():<12}{tracker.place()}")
        return summary

    def _lines(self) -> list[dict[str, Any]]:
        file = self.directory / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []

    def close(self) -> None:
        """Flush and end the display."""
        self.display.close()
        self._tell_samples()
        for tracker in self._trackers:
            tracker.close()


def _null_where_not_finite(value: Any) -> Any:
    """JSON has no NaN and no infinity, which the loss of a skipped update may be."""
    if isinstance(value, dict):
        return {key: _null_where_not_finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _keep_lines_of(file: Path, finished: int | None, steps: int) -> None:
    """Keep the lines up to step `finished`, without a torn last line and the evaluation at the run's end.

    That evaluation is made again whenever a run reaches its end.
    """
    if not file.is_file():
        return
    kept: list[str] = []
    for text in file.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            break
        made_again = ("accuracy" in line or line.get("kind") == "evaluation") and line["step"] >= steps
        if finished is not None and line["step"] <= finished and not made_again:
            kept.append(text + "\n")
    fresh = file.with_name(file.name + ".partial")
    fresh.write_text("".join(kept), encoding="utf-8")
    fresh.replace(file)
