"""Megatron distributed checkpoints of a run: complete or not there at all.

`checkpoints/step_000010/` holds Megatron's files and `progress.json`, which lists them with their sizes;
`checkpoints/latest` names the newest complete one. A checkpoint is written under another name and renamed,
and `latest` is replaced atomically, so a run killed at any moment leaves the previous checkpoint whole. One
that was damaged later, by a full disk or a copy that broke off, is known by its list.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import StrictHandling

from megarl.config.model_shape import ModelShape
from megarl.errors import Refusal
from megarl.policy import adam_state
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
        facts = {"step": step, "optimizer": optimizer, "model": _sizes(policy.shape), "files": _files(partial)}
        (partial / "progress.json").write_text(json.dumps(progress | facts))
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _replace_text(root / "latest", final.name)
        _remove_old(root, keep, final.name)
    dist.barrier()
    return final


def load(policy: Policy, directory: Path, *, optimizer: bool) -> dict[str, Any]:
    """Load weights, and with `optimizer` its state and schedule too; returns the saved progress.

    Raises `Refusal` where the checkpoint is damaged, of another model, or lacks the optimizer's state.
    """
    if (damage := _damage(directory)) is not None:
        raise _refusal(str(directory), damage)
    progress = read_progress(directory)
    for name, size in _sizes(policy.shape).items():
        if progress["model"][name] != size:
            raise Refusal(
                f"{directory} of a model with {name}={progress['model'][name]}",
                f"must be of the run's model, which has {name}={size}",
                "set model.path to the model that the checkpoint was trained from",
            )
    if optimizer and not progress["optimizer"]:
        raise Refusal(
            str(directory),
            "was saved without the optimizer's state, so the run cannot continue from it",
            "start a new run with model.weights set to it, or save with checkpoint.optimizer=true",
        )
    state: Any = dist_checkpointing.load(
        _state(policy, optimizer=optimizer, loading=True), str(directory), strict=StrictHandling.RAISE_UNEXPECTED
    )
    for key, model in _models(policy).items():
        _load_model(model, state[key])
    if optimizer:
        policy.scheduler.load_state_dict(state["scheduler"])
        adam_state.load(policy.optimizer, state["optimizer"], policy.scheduler.num_steps)
    else:
        policy.weights_changed()
    return progress


def _load_model(model: torch.nn.Module, state: dict[str, Any]) -> None:
    """Load every parameter. Transformer Engine's extra state (FP8 history) is not saved and may be missing."""
    missing, unexpected = model.load_state_dict(state, strict=False)
    missing = [name for name in missing if not name.endswith("_extra_state")]
    if missing or unexpected:
        raise Refusal(
            f"a checkpoint with {len(missing)} parameters missing and {len(unexpected)} unexpected "
            f"({', '.join([*missing, *unexpected][:3])})",
            "must hold exactly the model's parameters",
            "use a checkpoint of this model",
        )


def find(path: str | Path) -> Path | None:
    """The checkpoint that `path` means, or None without one.

    `path` is a checkpoint itself, or a folder whose `latest` (or that of its checkpoints/) names one. Where that one
    is damaged, the newest whole one before it is found. Raises `Refusal` where damaged ones are all there is.
    """
    path = Path(path)
    if (path / "progress.json").is_file() or (path.name.startswith("step_") and path.is_dir()):
        candidates = [path]
    else:
        root = next((r for r in (path, path / "checkpoints") if (r / "latest").is_file()), None)
        if root is None:
            return None
        named = (root / "latest").read_text().strip()
        candidates = sorted((d for d in _finished(root) if d.name <= named), reverse=True) or [root / named]
    damages = [_damage(candidate) for candidate in candidates]
    for candidate, damage in zip(candidates, damages, strict=True):
        if damage is None:
            return candidate
    raise _refusal(str(candidates[0]), damages[0] or "")


def require(path: str | Path, setting: str) -> Path:
    """`find`, or a `Refusal` that names the setting."""
    found = find(path)
    if found is None:
        raise Refusal(
            f"{setting}={path}",
            "must be a checkpoint, or a folder whose `latest` names one",
            "give a checkpoints/step_... directory, or a run's folder",
        )
    return found


def read_progress(directory: Path) -> dict[str, Any]:
    """What the loop saved beside the weights."""
    return json.loads((directory / "progress.json").read_text())


def _state(policy: Policy, *, optimizer: bool, loading: bool) -> dict[str, Any]:
    # Megatron adds this layout's process groups to the record that it is given.
    metadata = dict(_METADATA)
    state: dict[str, Any] = {}
    for key, model in _models(policy).items():
        found = model.sharded_state_dict(metadata=metadata)
        state[key] = {k: v for k, v in found.items() if not k.endswith("_extra_state")}
    if optimizer:
        adam_state.allocate(policy.optimizer)
        state["optimizer"] = policy.optimizer.sharded_state_dict(dict(state), is_loading=loading, metadata=metadata)
        state["scheduler"] = policy.scheduler.state_dict()
    return state


def _models(policy: Policy) -> dict[str, Any]:
    """This rank's model chunks by Megatron's keys: model, or model0, model1, ..."""
    chunks: list[Any] = policy.chunks
    return {"model": chunks[0]} if len(chunks) == 1 else {f"model{i}": chunk for i, chunk in enumerate(chunks)}


def _replace_text(file: Path, text: str) -> None:
    fresh = file.with_name(file.name + ".new")
    with open(fresh, "w") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    fresh.replace(file)


def _remove_old(root: Path, keep: int, newest: str) -> None:
    for directory in sorted(_finished(root))[:-keep]:
        if directory.name != newest:
            shutil.rmtree(directory, ignore_errors=True)


def _finished(root: Path) -> list[Path]:
    """Checkpoints that were renamed to their final name."""
    return [d for d in root.glob("step_*") if d.is_dir() and not d.name.endswith(".partial")]


def _files(directory: Path) -> dict[str, int]:
    """Sizes in bytes of Megatron's files."""
    return {file.name: file.stat().st_size for file in sorted(directory.iterdir())}


def _sizes(shape: ModelShape) -> dict[str, Any]:
    """What two models must share to hold the same tensors."""
    names = ("family", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "ffn_size", "vocab_size")
    return {name: getattr(shape, name) for name in (*names, "tied_embeddings", "qkv_bias", "qk_norm")}


def _damage(directory: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None where it is whole."""
    try:
        expected: dict[str, int] = read_progress(directory)["files"]
    except FileNotFoundError:
        return "has no progress.json, which is written last"
    except (ValueError, KeyError):
        return "has a progress.json that cannot be read"
    present = _files(directory)
    for name, size in expected.items():
        if name not in present:
            return f"has lost its file {name}"
        if present[name] != size:
            return f"has {present[name]} of the {size} bytes of its file {name}"
    return None


def _refusal(checkpoint: str, damage: str) -> Refusal:
    fix = "copy it again, or use an earlier one; without any, remove the folder to start from the beginning"
    return Refusal(checkpoint, f"must be a complete checkpoint, but {damage}", fix)
