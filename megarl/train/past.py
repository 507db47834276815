"""What a run of this name has left, and what it means for one that starts: refused, continued or finished. Torch-free.

A checkpoint keeps the configuration that it was trained with. A run that continues from it may have other settings,
which are said and kept; other data, another model or another seed would make it another run, and are refused unless
`resume_changes` names them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megarl.config import files
from megarl.config.load import dump_config, load_config
from megarl.config.model_shape import read_model_shape
from megarl.config.schema import RunConfig
from megarl.errors import Refusal
from megarl.formats import checkpoint_folder
from megarl.records import Prompt

#: The parts of a run that make it what it is; the choices of `resume_changes`.
PARTS = ("seed", "model", "data")
_ELSEWHERE = "set runs_dir to a place where this user may write, or move away what is there"
#: Settings and sections that change no number of a run by more than rounding, or that are there to be changed.
_FREE = (
    "name", "runs_dir", "resume", "resume_changes", "steps", "epochs", "parallel", "recompute", "checkpoint", "logging",
    "weights", "health", "rollout.tensor", "rollout.expert_parallel", "rollout.chunk", "rollout.max_concurrent",
    "rollout.kv_cache_gib", "rollout.gpu_memory_fraction", "rollout.save", "rollout.keep_unfinished", "reward.workers",
    "evaluation.save",
    "batch.tokens_per_microbatch", "batch.packed", "batch.logprob_chunk",
)  # fmt: skip


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
    yield from changed_parts(config, _configuration(checkpoint, directory), checkpoint)
    progress = checkpoint_folder.read_progress(checkpoint)
    checkpoint_folder.check_resumable(checkpoint, progress)
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


def changed_parts(config: RunConfig, before: Mapping[str, Any] | None, checkpoint: Path) -> Iterator[Refusal]:
    """Refusals of a seed, a model or data that differ from those `before`, of a checkpoint's configuration."""
    for key, old, new in _differences(config, before):
        part = key.partition(".")[0]
        if part in PARTS and part not in config.resume_changes:
            yield Refusal(
                f"{key}={_shown(new)} with resume={config.resume}",
                f"differs from {_shown(old)}, with which {checkpoint} was trained",
                f"set it back, begin a new run under another name, or go on all the same with resume_changes=[{part}]",
            )


def rows_of(prompts: Sequence[Prompt]) -> dict[str, Any]:
    """The number of prompts that are trained on, and a digest of them: the same file may have other rows."""
    digest = hashlib.sha256()
    for prompt in prompts:
        solution = [] if prompt.solution is None else [prompt.solution]
        digest.update(json.dumps([prompt.index, prompt.text, prompt.answer, *solution]).encode())
    return {"prompts": len(prompts), "digest": digest.hexdigest()}


def changed_rows(
    config: RunConfig, found: Mapping[str, Any], known: Mapping[str, Any] | None, checkpoint: Path
) -> Iterator[Refusal]:
    """A refusal of other rows, by `rows_of`, than a checkpoint's `known`, which older ones do not have."""
    if known not in (None, found) and "data" not in config.resume_changes:
        yield Refusal(
            f"data of {found['prompts']} prompts with resume={config.resume}",
            f"has other rows than those that {checkpoint} was trained on, {known['prompts']} prompts",
            "bring the data back, begin a new run under another name, or go on all the same with resume_changes=[data]",
        )


def changes(config: RunConfig, before: Mapping[str, Any] | None, checkpoint: Path) -> str | None:
    """A sentence about what differs from a checkpoint's configuration `before`; None where nothing of weight does."""
    words = ", ".join(f"{key}={_shown(new)} (was {_shown(old)})" for key, old, new in _differences(config, before))
    return f"continues {checkpoint.name} with other settings: {words}" if words else None


def outlook(config: RunConfig) -> str | None:
    """A sentence about what is left of a run that would continue, for a run whose `refusals` are none."""
    if (sentence := finished(config)) is not None or config.resume == "never":
        return sentence
    directory = run_directory(config)
    checkpoint = checkpoint_folder.find(directory / "checkpoints")
    if checkpoint is None:
        return None
    return changes(config, _configuration(checkpoint, directory), checkpoint)


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
    checkpoint = checkpoint_folder.find(directory / "checkpoints")
    saved = 0 if checkpoint is None else checkpoint_folder.read_progress(checkpoint)["step"]
    if config.checkpoint.end and saved < config.steps:
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


def _configuration(checkpoint: Path, directory: Path) -> dict[str, Any] | None:
    """What a checkpoint was trained with; of one that does not keep it, as older ones, what its run's folder says."""
    kept = checkpoint_folder.read_progress(checkpoint).get("config")
    if kept is not None:
        return kept
    try:
        return load_config(directory / "config.yaml").model_dump(mode="json")
    except Refusal:
        return None


def _differences(config: RunConfig, before: Mapping[str, Any] | None) -> Iterator[tuple[str, Any, Any]]:
    """Keys that both configurations have, with the old and the new value."""
    if before is None:
        return
    # As it will be read from JSON again.
    now = json.loads(json.dumps(config.model_dump(mode="json")))
    for key, old, new in _both(before, now):
        if new != old and not _same_place(key, old, new) and not _is_free(key):
            yield key, old, new


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in _FREE)


def _same_place(key: str, old: Any, new: Any) -> bool:
    """Whether two spellings of a path lead to one place."""
    if not (key.endswith(("path", "tokenizer", "weights")) and isinstance(old, str) and isinstance(new, str)):
        return False
    return Path(old).resolve() == Path(new).resolve()


def _both(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Each setting that both tables have, with its two values; a table that may have any keys is one setting."""
    for key, old in before.items():
        if key not in now:
            continue
        name, new = f"{prefix}{key}", now[key]
        closed = name not in ("megatron", "vllm") and key != "extra"
        if closed and isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _both(old, new, f"{name}.")
        else:
            yield name, old, new


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
