"""Megatron distributed checkpoints of a run: complete or not there at all.

`checkpoints/step_000010/` holds Megatron's files and `progress.json`; `checkpoints/latest` names the
newest complete one. A checkpoint is written under another name and renamed, and `latest` is replaced
atomically, so a run killed at any moment leaves the previous checkpoint whole.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import StrictHandling

from megarl.errors import Refusal
from megarl.policy.policy import Policy

#: Optimizer state in model space: it loads under any layout, not only under the one it was saved with.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def save(policy: Policy, root: Path, step: int, progress: dict[str, Any], *, optimizer: bool, keep: int) -> Path:
    """Save under `root/step_XXXXXX` and point `root/latest` at it; keeps the newest `keep` checkpoints."""
    final = root / f"step_{step:06d}"
    partial = root / f"{final.name}.partial"
    if policy.world.is_first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    state = _state(policy, optimizer=optimizer, loading=False)
    dist_checkpointing.save(state, str(partial), content_metadata=dict(_METADATA))
    dist.barrier()
    if policy.world.is_first:
        (partial / "progress.json").write_text(json.dumps(progress | {"step": step, "optimizer": optimizer}))
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _replace_text(root / "latest", final.name)
        _remove_old(root, keep, final.name)
    dist.barrier()
    return final


def load(policy: Policy, directory: Path, *, optimizer: bool) -> dict[str, Any]:
    """Load weights, and with `optimizer` its state and schedule too; returns the saved progress."""
    progress = read_progress(directory)
    if optimizer and not progress["optimizer"]:
        raise Refusal(
            str(directory),
            "was saved without the optimizer's state, so the run cannot continue from it",
            "start a new run with model.weights set to it, or save with checkpoint.optimizer=true",
        )
    state: Any = dist_checkpointing.load(
        _state(policy, optimizer=optimizer, loading=True), str(directory), strict=StrictHandling.RAISE_UNEXPECTED
    )
    policy.model.load_state_dict(state["model"])
    if optimizer:
        policy.optimizer.load_state_dict(state["optimizer"])
        policy.scheduler.load_state_dict(state["scheduler"])
    else:
        policy.weights_changed()
    return progress


def find(path: str | Path) -> Path | None:
    """The checkpoint that `path` means: itself, or what `latest` in it or in its checkpoints/ names; or None."""
    path = Path(path)
    if (path / "progress.json").is_file():
        return path
    for root in (path, path / "checkpoints"):
        if (root / "latest").is_file():
            named = root / (root / "latest").read_text().strip()
            return named if (named / "progress.json").is_file() else None
    return None


def require(path: str | Path, setting: str) -> Path:
    """`find`, or a `Refusal` that names the setting."""
    found = find(path)
    if found is None:
        raise Refusal(
            f"{setting}={path}",
            "must be a complete checkpoint, or a folder whose `latest` names one",
            "give a checkpoints/step_... directory that holds progress.json",
        )
    return found


def read_progress(directory: Path) -> dict[str, Any]:
    """What the loop saved beside the weights."""
    return json.loads((directory / "progress.json").read_text())


def _state(policy: Policy, *, optimizer: bool, loading: bool) -> dict[str, Any]:
    model = policy.model.sharded_state_dict(metadata=_METADATA)
    state: dict[str, Any] = {"model": {k: v for k, v in model.items() if not k.endswith("_extra_state")}}
    if optimizer:
        state["optimizer"] = policy.optimizer.sharded_state_dict(state["model"], is_loading=loading, metadata=_METADATA)
        state["scheduler"] = policy.scheduler.state_dict()
    return state


def _replace_text(file: Path, text: str) -> None:
    fresh = file.with_name(file.name + ".new")
    with open(fresh, "w") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    fresh.replace(file)


def _remove_old(root: Path, keep: int, newest: str) -> None:
    complete = sorted(d for d in root.glob("step_*") if d.is_dir() and not d.name.endswith(".partial"))
    for directory in complete[:-keep]:
        if directory.name != newest:
            shutil.rmtree(directory, ignore_errors=True)
