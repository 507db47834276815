"""Megatron distributed checkpoints of a run: complete or not there at all, and known to be what was saved.

A checkpoint is written under another name and renamed, and `latest` is replaced atomically, so a run killed at any
moment leaves the previous checkpoint whole. One that was damaged later, by a full disk, a copy that broke off or a bad
disk, is known by its list of files with sizes and checksums; see `megarl.formats.checkpoint_folder`. That the optimizer
has its weights and moments again is known by digests of them, and so is whether a save has anything new.
"""

from __future__ import annotations

import queue
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint.api import CheckpointException

from megarl.config.parameter_sets import POLICY
from megarl.errors import Refusal
from megarl.formats import checkpoint_folder, checksums, megatron
from megarl.parallel.bootstrap import World
from megarl.parallel.exchange import first_decides, from_first, gather_all
from megarl.policy import adam_state
from megarl.policy import digest as digests
from megarl.policy.model import is_expert
from megarl.policy.policy import Policy


def save(
    policy: Policy, root: Path, step: int, progress: dict[str, Any], *, optimizer: bool, keep: int, keep_every: int = 0
) -> Path:
    """Save under `root/step_XXXXXX` and point `root/latest` at it; older ones go as in `checkpoint_folder.publish`.

    Collective. With nothing written, raises on all ranks `Refusal` where the disk has no room for it, and
    `TrainingStopped` where updates were made and have left no trace in it.
    """
    final = root / f"step_{step:06d}"
    digest = digests.digest(policy.trained[POLICY].optimizer)
    policy.trained[POLICY].movement.check(digest, final.name)
    partial = root / f"{final.name}.partial"
    if policy.world.is_first:
        # A save that was killed has taken room.
        checkpoint_folder.remove_unfinished(root)
    _require_room(policy, root, optimizer=optimizer)
    if policy.world.is_first:
        partial.mkdir()
    dist.barrier()
    state = _state(policy, megatron.CONTENT, optimizer=optimizer, loading=False)
    # Megatron would start a process to hold the writers' results, for saves that go on behind the caller's back. It
    # takes seconds to start, and stays when this one is killed.
    writers: Any = filesystem_async
    writers._results_queue = writers._results_queue or queue.Queue()
    with _causes_named():
        dist_checkpointing.save(state, str(partial), content_metadata=dict(megatron.CONTENT))
    facts: dict[str, Any] = {"step": step, "optimizer": optimizer, "weights": digest.weights}
    if optimizer:
        facts["moments"] = digest.moments
    dist.barrier()
    names = from_first(checkpoint_folder.file_names(partial) if policy.world.is_first else [])
    mine = checksums.share(names, policy.world.rank, policy.world.size)
    found = gather_all({name: checksums.measure(partial / name) for name in mine})
    if policy.world.is_first:
        facts["model_path"] = str(Path(policy.config.model.path).resolve())
        measured = {name: stored for part in found for name, stored in part.items()}
        checkpoint_folder.write_progress(partial, policy.shape, progress | facts, measured)
        checkpoint_folder.publish(partial, final, keep=keep, keep_every=keep_every)
    dist.barrier()
    policy.trained[POLICY].movement.begin_from(digest, final.name)
    return final


def load(policy: Policy, directory: Path, *, optimizer: bool) -> dict[str, Any]:
    """Load weights, and with `optimizer` its state and schedule too; returns the saved progress. Collective.

    Raises `Damaged` where the checkpoint is not whole; `Refusal` where it is of another model, lacks the optimizer's
    state, or where the optimizer's weights or moments are not those that were saved.
    """
    progress = first_decides(lambda: _read_whole(directory))
    checkpoint_folder.check_model(directory, progress, policy.shape)
    if optimizer:
        checkpoint_folder.check_resumable(directory, progress)
    _check_bytes(directory, progress, policy.world)
    # How the checkpoint names its tensors, which need not be how this version does.
    content = dist_checkpointing.load_content_metadata(str(directory)) or megatron.CONTENT
    template: Any = _state(policy, content, optimizer=optimizer, loading=True)
    with _causes_named():
        state: Any = dist_checkpointing.load(template, str(directory), strict=StrictHandling.RAISE_UNEXPECTED)
    for key, model in _models(policy).items():
        _load_model(model, state[key])
    if optimizer:
        trained = policy.trained[POLICY]
        trained.scheduler.load_state_dict(state["scheduler"])
        adam_state.load(trained.optimizer, state["optimizer"], trained.scheduler.num_steps)
        found = digests.digest(trained.optimizer)
        _check_state(directory, progress, found)
        trained.movement.begin_from(found, directory.name)
    else:
        policy.weights_changed()
    return progress


def _read_whole(directory: Path) -> dict[str, Any]:
    checkpoint_folder.check_whole(directory)
    return checkpoint_folder.read_progress(directory)


def _check_bytes(directory: Path, progress: dict[str, Any], world: World) -> None:
    """Raise `Damaged` on all ranks, which share the reading, where a file has other bytes than were saved.

    Each rank looks whether all files are there for it too.
    """
    mine = checksums.share(progress["files"], world.rank, world.size)
    found = gather_all(checkpoint_folder.damage_of(directory) or checkpoint_folder.altered(directory, mine))
    for damage in found:
        if damage is not None:
            raise checkpoint_folder.Damaged(directory, damage)


def _check_state(directory: Path, progress: dict[str, Any], found: digests.Digest) -> None:
    for name, got in found._asdict().items():
        if progress[name] != got:
            raise Refusal(
                f"{directory} with {name} {progress[name]}",
                f"must give the optimizer the {name} that were saved, and gave it {got}",
                "continue with the versions of megatron-core and megarl that saved it",
            )


@contextmanager
def _causes_named() -> Iterator[None]:
    """Torch's error of a file that cannot be read or written, which is no `Exception`, as an `OSError` with its causes.

    Collective where it is raised: all ranks raise it, but one alone has the causes.
    """
    try:
        yield
    except CheckpointException as error:
        causes: list[list[str]] = gather_all([str(cause) for cause, _ in error.failures.values()])
        raise OSError("; ".join(dict.fromkeys(cause for some in causes for cause in some))) from error


def _require_room(policy: Policy, root: Path, *, optimizer: bool) -> None:
    """Raise `Refusal` where the disk has less room than a checkpoint takes: what is there stays as it is."""
    grid = policy.grid
    ranks = grid.tensor * grid.context * grid.data
    needed = 0.0
    for _, parameter in policy.named_parameters():
        # The optimizer has fp32 weights and two moments, wherever the ranks keep them.
        size = parameter.numel() * (parameter.element_size() + (12 if optimizer else 0))
        holders = grid.expert * grid.expert_tensor if is_expert(parameter) else grid.tensor
        needed += size * holders / ranks
    needed = sum(gather_all(needed))
    root.mkdir(parents=True, exist_ok=True)
    free = from_first(shutil.disk_usage(root).free)
    if free < needed:
        raise Refusal(
            f"{root} with {free / 1e9:.2f} GB free",
            f"must have room for a checkpoint, {needed / 1e9:.2f} GB; nothing was written or removed",
            "free some space and go on with resume=auto; checkpoint.keep says how many are kept",
        )


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
        trained = policy.trained[POLICY]
        adam_state.allocate(trained.optimizer)
        state["optimizer"] = trained.optimizer.sharded_state_dict(dict(state), is_loading=loading, metadata=metadata)
        state["scheduler"] = trained.scheduler.state_dict()
    return state


def _models(policy: Policy) -> dict[str, Any]:
    """This rank's model chunks by Megatron's keys: model, or model0, model1, ..."""
    chunks: list[Any] = policy.chunks
    return {"model": chunks[0]} if len(chunks) == 1 else {f"model{i}": chunk for i, chunk in enumerate(chunks)}
