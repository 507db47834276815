"""What is evaluated: a run's YAML file, a checkpoint or run folder of megarl's, or a Hugging Face folder.

Torch-free.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from megarl.config.load import read_with_base
from megarl.config.yaml_dialect import Plain
from megarl.errors import Refusal
from megarl.formats import checkpoint_folder

#: What an evaluation takes over from a run's file; all else is about training.
_KEPT = (
    "name", "runs_dir", "seed", "precision", "fp8", "deterministic", "model", "parameters", "adapter", "parallel",
    "moe", "logging", "weights", "health", "megatron", "vllm",
)  # fmt: skip
#: Of the section rollout: about the engine, and about the end of an answer and of its thinking.
_KEPT_OF_ROLLOUT = (
    "tensor", "expert_parallel", "precision", "stop_token_ids", "thinking_end", "assignment", "chunk",
    "max_concurrent", "kv_cache_gib", "gpu_memory_fraction",
)  # fmt: skip
#: What a checkpoint is computed with wherever it is; layouts are those of the machine that trained it.
_KEPT_OF_CHECKPOINT = ("seed", "precision", "fp8", "parameters", "adapter", "moe")
_KEPT_OF_ITS_ROLLOUT = ("stop_token_ids", "thinking_end")


class Target(NamedTuple):
    """`base`: what a run's file would say of it, without data, evaluation and training. `label`: its name among the
    models of its run."""

    base: dict[str, Any]
    label: str


def read_target(path: Path, checkpoint: str | None = None, *, model_given: bool = False) -> Target:
    """What `path` means; `checkpoint`, of megarl's or a Hugging Face folder, replaces the model that a YAML file names.

    `model_given`: somebody else says which folder a checkpoint's configuration and tokenizer are in (model.path).

    Raises `Refusal` where it is nothing that can be evaluated.
    """
    path = Path(os.path.expanduser(path))
    if not path.is_dir():
        return _of_file(path, checkpoint)
    if checkpoint is not None:
        raise Refusal(f"checkpoint={checkpoint}", f"is a second one beside {path}", "give one of the two")
    found = None if (path / "config.json").is_file() else checkpoint_folder.find(path)
    if found is not None:
        return _of_checkpoint(found, model_given=model_given)
    if (path / "config.json").is_file():
        return _of_hf(path)
    if (path / "hf" / "config.json").is_file():
        return _of_hf(path / "hf")
    raise Refusal(
        str(path),
        "is no model: neither a checkpoint or run folder of megarl's, nor a Hugging Face folder with a config.json",
        "give one of these, or a run's YAML file",
    )


def _of_file(path: Path, checkpoint: str | None) -> Target:
    table = read_with_base(path)
    base = {key: table[key] for key in _KEPT if key in table}
    rollout = table.get("rollout")
    if isinstance(rollout, dict):
        base["rollout"] = {key: rollout[key] for key in _KEPT_OF_ROLLOUT if key in rollout}
    base.setdefault("name", path.stem)
    model = base.get("model")
    if not isinstance(model, dict):
        raise Refusal(str(path), "must name a model", "write model.path")
    model = base["model"] = dict(model)
    if checkpoint is not None and (Path(checkpoint) / "config.json").is_file():
        # Such as the run's own export, into which an adapter is merged.
        base = {key: value for key, value in base.items() if key not in ("parameters", "adapter")}
        base["model"] = {**model, "path": checkpoint, "weights": None}
        return Target(_whole(base), _label(Path(checkpoint)))
    if checkpoint is not None:
        model["weights"] = checkpoint
    weights = model.get("weights")
    if weights is None or str(weights) == "null":
        return Target(_whole(base), _label(Path(str(model.get("path", "model")))))
    found = checkpoint_folder.require(os.path.expanduser(str(weights)), "model.weights")
    model["weights"] = str(found)
    return Target(_whole(base), found.name)


def _of_checkpoint(checkpoint: Path, *, model_given: bool) -> Target:
    """A checkpoint alone: its model's configuration and tokenizer are where it says."""
    progress = checkpoint_folder.read_progress(checkpoint)
    try:
        folder = checkpoint_folder.hf_folder(checkpoint)
    except Refusal:
        if not model_given:
            raise Refusal(
                str(checkpoint),
                "has no tokenizer and no config.json beside its weights, and does not say where its model's are",
                "say it with model.path=DIR, or evaluate the run's hf/ folder",
            ) from None
        folder = checkpoint
    trained = progress.get("config") or {}
    base: dict[str, Any] = {key: trained[key] for key in _KEPT_OF_CHECKPOINT if key in trained}
    base["rollout"] = {key: v for key, v in (trained.get("rollout") or {}).items() if key in _KEPT_OF_ITS_ROLLOUT}
    base["model"] = {"path": str(folder), "weights": str(checkpoint)}
    tokenizer = (trained.get("model") or {}).get("tokenizer")
    if tokenizer is not None and Path(tokenizer).exists():
        base["model"]["tokenizer"] = tokenizer
    return Target(_whole(base | _place(_run_of(checkpoint))), checkpoint.name)


def _of_hf(folder: Path) -> Target:
    run = folder.resolve().parent if folder.name == "hf" else None
    place = _place(run) if run is not None and (run / "config.yaml").is_file() else {"name": _label(folder)}
    return Target(_whole({"model": {"path": str(folder)}} | place), _label(folder))


def _run_of(checkpoint: Path) -> Path | None:
    """The folder of the run that a checkpoint lies in."""
    root = checkpoint.resolve().parent
    return root.parent if root.name == "checkpoints" else None


def _place(run: Path | None) -> dict[str, Any]:
    """Where results go: beside the run, else among the runs of the working folder."""
    return {"name": "evaluation"} if run is None else {"name": _label(run), "runs_dir": str(run.parent)}


def _label(path: Path) -> str:
    """A folder's name as one that a run may have."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", path.resolve().name).strip("._-")
    return name[:100] or "model"


def _whole(base: dict[str, Any]) -> dict[str, Any]:
    """`base` with what every run must say. The engine's longest answer is then the evaluation's."""
    rollout = {**base.get("rollout", {}), "max_tokens": Plain("1")}
    return {**base, "steps": Plain("1"), "algorithm": {"name": Plain("grpo")}, "rollout": rollout}


def fingerprint(path: str, weights: str | None, tokenizer: str | None) -> str:
    """What tells weights and tokenizer from others in the same places: sizes and times of a Hugging Face folder's
    files, and a checkpoint's own notes, which have its files' checksums."""
    found = hashlib.sha256()
    folders = [Path(path), *([] if tokenizer is None else [Path(tokenizer)])]
    for folder in folders:
        for file in sorted(folder.iterdir()) if folder.is_dir() else [folder]:
            if file.is_file():
                facts = file.stat()
                found.update(f"{file.name} {facts.st_size} {facts.st_mtime_ns}\n".encode())
    notes = None if weights is None else Path(weights) / "progress.json"
    if notes is not None and notes.is_file():
        found.update(notes.read_bytes())
    return found.hexdigest()
