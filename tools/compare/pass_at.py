"""pass@k of an experiment's start: answers to the held-out problems, sampled by `megarl generate`."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compare import runs
from compare.experiments import Experiment
from compare.files import read_json, read_rows, write_json

#: Held-out problems that are asked, at most.
PROBLEMS = 64


def solved_share(
    experiment: Experiment, out: Path, root: Path, changes: Sequence[str], start: Mapping[str, Any]
) -> float:
    """Share of the first held-out problems with a right answer among `experiment.pass_at` samples of the start, whose
    recipe is `start`.

    Raises `runs.RunFailed` where `megarl generate` does.
    """
    arm, folder = experiment.arms[0], out / "runs" / f"{experiment.name}_pass_at"
    result = folder / "solved.json"
    given = {"changes": list(changes), "start": dict(start)}
    if not result.is_file() or read_json(result)["given"] != given:
        heldout = Path("data") / experiment.start.name / "heldout.jsonl"
        problems = min(PROBLEMS, len(read_rows(root / heldout)))
        shutil.rmtree(folder, ignore_errors=True)
        overrides = [*arm.overrides, *changes, f"data.path={heldout}", "data.solution_column=null", "steps=1"]
        overrides += [f"batch.prompts={problems}", "batch.updates=1", f"rollout.group_size={experiment.pass_at}"]
        overrides += ["evaluation.start=false", "evaluation.end=false", "evaluation.every=0"]
        names = [f"name={folder.name}", f"runs_dir={folder.parent}", "logging.tensorboard=false"]
        config = str(runs.ROOT / "configs" / arm.config)
        runs.call(["generate", config, *names, *overrides], root, folder / "log.txt")
        write_json(result, _solved(folder, problems) | {"given": given})
    return float(read_json(result)["solved_share"])


def _solved(folder: Path, problems: int) -> dict[str, float]:
    samples = [sample for file in sorted((folder / "rollouts").glob("*.jsonl")) for sample in read_rows(file)]
    solved = {sample["prompt_index"] for sample in samples if sample["reward"]}
    right = sum(bool(sample["reward"]) for sample in samples)
    return {
        "problems": problems,
        "samples": len(samples),
        "right_samples": right,
        "solved_share": len(solved) / problems,
    }
