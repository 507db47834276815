"""Megatron distributed checkpoints of a run: complete or not there at all.

A checkpoint is written under another name and renamed, and `latest` is replaced atomically, so a run killed at any
moment leaves the previous checkpoint whole. One that was damaged later, by a full disk or a copy that broke off, is
known by its list of files; see `megarl.formats.checkpoint_folder`.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import StrictHandling

from megarl.errors import Refusal
from megarl.formats import checkpoint_folder, megatron
from megarl.policy import adam_state
from megarl.policy.policy import Policy


def save(policy: Policy, root: Path, step: int, progress: dict[str, Any], *, optimizer: bool, keep: int) -> Path:
    """Save under `root/step_XXXXXX` and point `root/latest` at it; keeps the newest `keep` checkpoints."""
    final = root / f"step_{step:06d}"
    partial = root / f"{final.name}.partial"
    if policy.world.is_first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    state = _state(policy, megatron.CONTENT, optimizer=optimizer, loading=False)
    dist_checkpointing.save(state, str(partial), content_metadata=dict(megatron.CONTENT))
    dist.barrier()
    if policy.world.is_first:
        facts = {"step": step, "optimizer": optimizer, "model_path": str(Path(policy.config.model.path).resolve())}
        checkpoint_folder.write_progress(partial, policy.shape, progress | facts)
        checkpoint_folder.publish(partial, final, keep)
    dist.barrier()
    return final


def load(policy: Policy, directory: Path, *, optimizer: bool) -> dict[str, Any]:
    """Load weights, and with `optimizer` its state and schedule too; returns the saved progress.

    Raises `Refusal` where the checkpoint is damaged, of another model, or lacks the optimizer's state.
    """
    checkpoint_folder.check_whole(directory)
    progress = checkpoint_folder.read_progress(directory)
    checkpoint_folder.check_model(directory, progress, policy.shape)
    if optimizer and not progress["optimizer"]:
        raise Refusal(
            str(directory),
            "was saved without the optimizer's state, so the run cannot continue from it",
            "start a new run with model.weights set to it, or save with checkpoint.optimizer=true",
        )
    # How the checkpoint names its tensors, which need not be how this version does.
    content = dist_checkpointing.load_content_metadata(str(directory)) or megatron.CONTENT
    state: Any = dist_checkpointing.load(
        _state(policy, content, optimizer=optimizer, loading=True),
        str(directory),
        strict=StrictHandling.RAISE_UNEXPECTED,
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


def _state(policy: Policy, content: dict[str, Any], *, optimizer: bool, loading: bool) -> dict[str, Any]:
    # Megatron adds this layout's process groups to the record that it is given.
    metadata = dict(content)
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
