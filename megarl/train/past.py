"""What a run of this name has left, and what it means for one that starts: refused, continued or finished.

Torch-free. How its configuration and data may differ stands in `megarl.train.differences`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from megarl.config import files
from megarl.config.implied import Implied
from megarl.config.load import dump_config
from megarl.config.model_shape import read_model_shape
from megarl.config.schema import RunConfig
from megarl.errors import Refusal
from megarl.formats import checkpoint_folder
from megarl.train import differences

_ELSEWHERE = "set runs_dir to a place where this user may write, or move away what is there"


def run_directory(config: RunConfig) -> Path:
    """`runs/<name>`."""
    return Path(config.runs_dir) / config.name


def refusals(config: RunConfig) -> Iterator[Refusal]:
    """What an earlier run of this name makes impossible."""
    yield from files.named(_refusals(config))


def _refusals(config: RunConfig) -> Iterator[Refusal]:
    directory = run_directory(config)
    yield from _unwritable(directory)
    if config.resume == "never":
        if checkpoint_folder.holds_a_run(directory):
            yield Refusal(
                f"name={directory.name}",
                f"already names a run, in {directory}, which a new one would mix with",
                "continue it with resume=auto, choose another name, or move the folder away",
            )
        return
    checkpoint = checkpoint_folder.find(directory / "checkpoints")
    if checkpoint is None:
        return
    progress = checkpoint_folder.read_progress(checkpoint)
    checkpoint_folder.check_resumable(checkpoint, progress)
    implied = Implied(config)
    checkpoint_folder.check_adapter(checkpoint, progress, implied.adapter, implied.base_is_frozen, resumes=True)
    yield from differences.changed_parts(config, progress["config"], checkpoint)
    if (Path(config.model.path) / "config.json").is_file():
        checkpoint_folder.check_model(checkpoint, progress, read_model_shape(config.model.path))


def _unwritable(directory: Path) -> Iterator[Refusal]:
    """A refusal where the run's folder is none, or cannot be made or written."""
    wanted = (directory / "checkpoints").absolute()
    there = next(place for place in (wanted, *wanted.parents) if os.path.lexists(place))
    if not there.is_dir():
        yield Refusal(str(directory), f"must be a folder that a run can write, and {there} is no folder", _ELSEWHERE)
    elif not os.access(there, os.W_OK | os.X_OK):
        yield Refusal(str(directory), f"must be a folder that a run can write, and {there} is not", _ELSEWHERE)


def steps_saved(config: RunConfig) -> int:
    """The step after which the run would continue; 0 where it begins."""
    checkpoint = None if config.resume == "never" else checkpoint_folder.find(run_directory(config) / "checkpoints")
    return 0 if checkpoint is None else checkpoint_folder.read_progress(checkpoint)["step"]


def outlook(config: RunConfig) -> str | None:
    """A sentence about what is left of a run that would continue, for a run whose `refusals` are none."""
    if (sentence := finished(config)) is not None or config.resume == "never":
        return sentence
    checkpoint = checkpoint_folder.find(run_directory(config) / "checkpoints")
    if checkpoint is None:
        return None
    return differences.changes(config, checkpoint_folder.read_progress(checkpoint)["config"], checkpoint)


def finished(config: RunConfig) -> str | None:
    """A sentence where the run that would continue has made all its steps and left its results, else None."""
    directory = run_directory(config)
    if config.epochs is not None:
        # How many steps they take is known when the data is read.
        return None
    if config.resume == "never" or (config.checkpoint.export_hf and not (directory / "hf").is_dir()):
        return None
    try:
        steps = json.loads((directory / "summary.json").read_text(encoding="utf-8"))["steps"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not isinstance(steps, int) or steps < config.steps:
        return None
    if config.checkpoint.end and steps_saved(config) < config.steps:
        # Somebody went back to an earlier checkpoint.
        return None
    return (
        f"{config.name} is finished: {steps} of {config.steps} steps are made, see {directory}/summary.json; "
        "raise steps to go on"
    )


def keep_configuration(config: RunConfig, step: int) -> None:
    """Write config.yaml; another that is there stays beside it, as the one that held until `step`."""
    directory = run_directory(config)
    file, text = directory / "config.yaml", dump_config(config)
    if file.is_file() and (before := file.read_text(encoding="utf-8")) != text:
        kept, number = directory / f"config.until_step_{step:06d}.yaml", 1
        while kept.exists():
            number += 1
            kept = directory / f"config.until_step_{step:06d}.{number}.yaml"
        kept.write_text(before, encoding="utf-8")
    file.write_text(text, encoding="utf-8")
