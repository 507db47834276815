"""What `megarl evaluate --suite` is to do: which benchmarks, of which weights, and what of it is done. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megarl.config.schema import RunConfig
from megarl.config.suites import Asked, Suite, asked
from megarl.errors import Refusal
from megarl.evaluation.answers import AnswersFile, Results, made_for
from megarl.evaluation.target import read_target


class Work(NamedTuple):
    """A benchmark that is to be answered: what for (`made_for`), and the folder of its suite's results. `suite`: what
    each benchmark of the suite is answered for, in the suite's order."""

    asked: Asked
    folder: Path
    made_for: str
    model: str
    suite: Mapping[str, str]


@dataclass(frozen=True)
class Evaluation:
    """All that is asked, and what of it is `left`."""

    works: tuple[Work, ...]
    left: tuple[Work, ...]

    @property
    def folders(self) -> list[Path]:
        """One a suite."""
        return list(dict.fromkeys(work.folder for work in self.works))

    @property
    def configs(self) -> list[RunConfig]:
        """The settings of the session, and of each benchmark that is left."""
        benchmarks = [work.asked for work in self.left]
        return [session_config(benchmarks), *(one.config for one in benchmarks)]

    def results(self) -> dict[str, dict[str, Any]]:
        """What results.json says, by suite: its benchmarks in the suite's order."""
        found = {}
        for folder in self.folders:
            mine = [work.asked for work in self.works if work.folder == folder]
            content = json.loads((folder / "results.json").read_text(encoding="utf-8"))
            content["benchmarks"] = {one.benchmark: content["benchmarks"][one.benchmark] for one in mine}
            found[mine[0].suite] = content
        return found


def make(
    target: Path, checkpoint: str | None, overrides: Sequence[str], suites: Sequence[Suite], pass_at: Sequence[int]
) -> Evaluation:
    """Plan the evaluation of `target` on `suites`. Raises `Refusal` for what cannot be evaluated so."""
    model_given = any(text.startswith("model.path=") for text in overrides)
    model = read_target(target, checkpoint, model_given=model_given)
    works = []
    for suite in suites:
        benchmarks = asked(suite, model.base, overrides, pass_at)
        wanted = {one.benchmark: made_for(one) for one in benchmarks}
        for one in benchmarks:
            run = Path(one.config.runs_dir) / one.config.name
            folder = run / "suites" / f"{model.label}.{suite.name}"
            weights = one.config.model.weights or one.config.model.path
            works.append(Work(one, folder, wanted[one.benchmark], weights, wanted))
    return Evaluation(tuple(works), tuple(work for work in works if not _is_done(work)))


def _is_done(work: Work) -> bool:
    """Whether the benchmark's scores are there, of the same answers and for the same k."""
    known = Results(work.folder, work.asked.suite, work.model).known().get(work.asked.benchmark)
    if known is None or known.get("made_for") != work.made_for:
        return False
    same = known.get("asked_pass_at") == list(work.asked.pass_at)
    return same and AnswersFile(work.folder, work.asked.benchmark, work.made_for).file.is_file()


def session_config(benchmarks: Sequence[Asked]) -> RunConfig:
    """The settings of a session that can answer them all: the first's, with the longest lengths of any."""
    first = benchmarks[0].config
    # An answer's place in the engine: of several turns all.
    longest = max((one.config.evaluation.max_tokens or one.config.rollout.max_tokens) * one.turns for one in benchmarks)
    prompts = max(one.config.data.max_prompt_tokens for one in benchmarks)
    changes: dict[str, Any] = {
        "evaluation": first.evaluation.model_copy(update={"max_tokens": longest, "reward": None}),
        "data": first.data.model_copy(update={"max_prompt_tokens": prompts}),
        "reward": first.evaluation.reward or first.reward,
        "batch": first.batch.model_copy(update={"tokens_per_microbatch": prompts + first.rollout.max_tokens + 1024}),
    }
    return first.model_copy(update=changes)


def whole_numbers(text: str | None) -> tuple[int, ...]:
    """The numbers of `1,4`; none without a text. Raises `Refusal`."""
    if text is None:
        return ()
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise Refusal(f"--pass-at {text}", "must be whole numbers from 1 on", "write for example --pass-at 1,4")
    return tuple(map(int, parts))
