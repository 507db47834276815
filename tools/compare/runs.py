"""Runs of `megarl`: start, follow, resume, and read what they recorded."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compare.files import read_json, read_rows, write_json

TOOLS = Path(__file__).resolve().parents[1]
ROOT = TOOLS.parent


#: What a curve may be drawn over, beside steps and metrics: all tokens that were generated until then.
TOKENS = "generated tokens"


class RunFailed(Exception):
    """A run of `megarl` that ended with an error; the message names its log and shows the end of it."""


@dataclass(frozen=True)
class Recorded:
    """What a finished run recorded: lines of training steps, and lines of evaluations, in order."""

    folder: Path
    steps: tuple[dict[str, Any], ...]
    evaluations: tuple[dict[str, Any], ...]

    def final(self, name: str) -> float:
        """`name` of the last evaluation."""
        return float(self.evaluations[-1][name])

    def curve(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of every evaluation or step that recorded `name`; evaluations first."""
        lines = self.evaluations if any(name in line for line in self.evaluations) else self.steps
        return [(int(line["step"]), float(line[name])) for line in lines if line.get(name) is not None]

    def paired(self, name: str, over: str) -> list[tuple[float, float]]:
        """(mean of `over` in the steps since the evaluation before, `name`) of every evaluation that steps precede."""
        points, last = [], 0
        for step, value in self.curve(name):
            between = [found for at, found in self.curve(over) if last < at <= step]
            last = step
            if between:
                points.append((sum(between) / len(between), value))
        return points

    def by_tokens(self, name: str) -> list[tuple[float, float]]:
        """(tokens generated in all steps until then, `name`) of every evaluation."""
        made = [(int(line["step"]), float(line.get("generated_tokens") or 0)) for line in self.steps]
        return [(sum(tokens for at, tokens in made if at <= step), value) for step, value in self.curve(name)]

    def mean(self, name: str, last: int | None = None) -> float:
        """Mean of a curve, or of its `last` points."""
        values = [value for _, value in self.curve(name)][-last if last else None :]
        return sum(values) / len(values)


def read(folder: Path) -> Recorded:
    """What the run in `folder` recorded."""
    lines = read_rows(folder / "metrics.jsonl")
    return Recorded(
        folder,
        tuple(line for line in lines if "accuracy" not in line),
        tuple(line for line in lines if "accuracy" in line),
    )


def train(folder: Path, config: str, overrides: Sequence[str], inputs: Path, start: Mapping[str, Any]) -> float:
    """Train a run in `folder` as the file `config` of configs/ says, changed by `overrides`; relative paths in it mean
    `inputs`, whose recipe is `start`. Returns the seconds it took; 0.0 for a run that is finished already.

    An interrupted run goes on from its last checkpoint. Raises `RunFailed` where it ends with an error, or `folder`
    holds a run with other settings or from another start.
    """
    given = {"config": config, "overrides": list(overrides), "start": dict(start)}
    request = folder / "request.json"
    if request.is_file() and read_json(request) != given:
        raise RunFailed(
            f"{folder} holds a run with other settings or from another start; move it away, or choose another --out"
        )
    if (folder / "summary.json").is_file():
        return 0.0
    folder.mkdir(parents=True, exist_ok=True)
    write_json(request, given)
    named = [f"name={folder.name}", f"runs_dir={folder.parent.resolve()}"]
    began = time.monotonic()
    call(
        ["train", str(ROOT / "configs" / config), *named, "resume=auto", "logging.tensorboard=false", *overrides],
        inputs,
        folder / "log.txt",
    )
    return time.monotonic() - began


def call(arguments: Sequence[str], cwd: Path, log: Path) -> None:
    """Run `megarl` with `arguments`, its output into `log`; shows the last line on a terminal."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(TOOLS), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "megarl", *arguments],
            cwd=cwd,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            while process.poll() is None:
                time.sleep(1.0)
                _show(_last_line(log))
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
            _show("")
    if process.returncode:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:])
        raise RunFailed(f"megarl {arguments[0]} ended with {process.returncode}; {log} ends with\n{tail}")


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return lines[-1].strip() if lines else ""


def _show(text: str) -> None:
    """Replace the terminal's current line; nothing where the output is no terminal."""
    if sys.stdout.isatty():
        print(f"\r\033[K    {text[:100]}" if text else "\r\033[K", end="", flush=True)
