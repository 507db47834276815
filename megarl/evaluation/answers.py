"""The answers of a benchmark on disk: each with its grade, kept as they come, so that nothing is made twice.

`<benchmark>.partial.jsonl` begins with a line that says what its answers were made for; it becomes
`<benchmark>.jsonl`, in the order of the problems, when all are there. `results.json` has the scores. Torch-free.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from megarl.config.schema import RunConfig
from megarl.config.suites import Asked
from megarl.evaluation.target import fingerprint
from megarl.formats import durable

Row = dict[str, Any]
#: Sections whose settings change no answer by more than rounding.
_ELSEWHERE = {"name", "runs_dir", "parallel", "recompute", "logging", "weights", "health", "checkpoint", "batch"}
_ELSEWHERE |= {"optimizer", "algorithm", "gpus", "steps", "epochs", "resume", "resume_changes"}
#: The engine's place and size.
_ENGINE = {"tensor", "expert_parallel", "chunk", "max_concurrent", "kv_cache_gib", "gpu_memory_fraction", "assignment"}


class Place(NamedTuple):
    """What names an answer within a benchmark."""

    prompt: int
    sample: int
    turn: int

    @classmethod
    def of(cls, row: Row) -> Place:
        return cls(row["prompt_index"], row["sample_index"], row.get("turn", 1))


class AnswersFile:
    """The answers of one benchmark in `folder`, made for `made_for`. One process writes."""

    def __init__(self, folder: Path, benchmark: str, made_for: str) -> None:
        self.file = folder / f"{benchmark}.jsonl"
        self._partial = folder / f"{benchmark}.partial.jsonl"
        self._made_for = made_for

    def kept(self) -> list[Row]:
        """The answers that an earlier process has kept: whole lines, made for the same."""
        if not self._partial.is_file():
            return []
        lines = self._partial.read_bytes().split(b"\n")[:-1]
        try:
            if not lines or json.loads(lines[0]) != {"made_for": self._made_for}:
                return []
            return [json.loads(line) for line in lines[1:]]
        except ValueError:
            return []

    def begin(self, kept: Iterable[Row]) -> None:
        """Write what is kept anew, without a line that was torn."""
        text = "".join(_line(row) for row in ({"made_for": self._made_for}, *kept))
        self._partial.parent.mkdir(parents=True, exist_ok=True)
        durable.replace_text(self._partial, text)

    def add(self, rows: Iterable[Row]) -> None:
        """Keep further answers: they survive the end of this process, and of the machine."""
        with open(self._partial, "a", encoding="utf-8") as handle:
            handle.writelines(_line(row) for row in rows)
            handle.flush()
            os.fsync(handle.fileno())

    def finish(self, rows: Iterable[Row]) -> list[Row]:
        """All answers in their order, as the benchmark's file; returned too."""
        ordered = sorted(rows, key=Place.of)
        durable.replace_text(self.file, "".join(_line(row) for row in ordered))
        return ordered

    def forget_partial(self) -> None:
        """Remove what was kept on the way, once the results are written."""
        self._partial.unlink(missing_ok=True)

    def read(self) -> list[Row]:
        """The finished file."""
        return [json.loads(line) for line in self.file.read_text(encoding="utf-8").splitlines()]


def _line(row: Row) -> str:
    return json.dumps(row) + "\n"


def made_for(asked: Asked) -> str:
    """A digest of all that decides a benchmark's answers and grades: settings, weights, and the problems' file."""
    config = asked.config
    table = {name: value for name, value in config.model_dump(mode="json").items() if name not in _ELSEWHERE}
    table["rollout"] = {name: value for name, value in table["rollout"].items() if name not in _ENGINE}
    model = config.model
    facts = [table, asked.asks_again, fingerprint(model.path, model.weights, model.tokenizer), _of_problems(config)]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _of_problems(config: RunConfig) -> list[list[Any]]:
    file = Path(str(config.data.path))
    if not file.is_file():
        return []
    facts = file.stat()
    return [[file.name, facts.st_size, facts.st_mtime_ns]]


class Results:
    """`results.json` of a suite and a model, in `folder`."""

    def __init__(self, folder: Path, suite: str, model: str) -> None:
        self.file = folder / "results.json"
        self._head = {"suite": suite, "model": model}

    def known(self) -> dict[str, dict[str, Any]]:
        """The benchmarks that are there, by name; empty where the file is missing or torn."""
        try:
            found = json.loads(self.file.read_text(encoding="utf-8"))
            return dict(found["benchmarks"])
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def write(self, content: dict[str, Any]) -> dict[str, Any]:
        """Replace the file, and return what is in it."""
        whole = self._head | content
        self.file.parent.mkdir(parents=True, exist_ok=True)
        durable.replace_text(self.file, json.dumps(whole, indent=1) + "\n")
        return whole
