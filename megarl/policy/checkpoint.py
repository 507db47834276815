"""Megatron distributed checkpoints of a run: complete or not there at all, and known to be what was saved.

A checkpoint is written under another name and renamed, and `latest` is replaced atomically, so a run killed at any
moment leaves the previous checkpoint whole. One that was damaged later, by a full disk, a copy that broke off or a bad
disk, is known by its list of files with sizes and checksums; see `megarl.formats.checkpoint_folder`. That the optimizer
has its weights and moments again is known by digests of them, and so is whether a save has anything new.
"""

from __future__ import annotations

import queue
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint.api import CheckpointException

from megarl.config.implied import Implied
from megarl.config.parameter_sets import POLICY
from megarl.errors import Refusal, with_causes
from megarl.formats import checkpoint_folder, checksums, megatron
from megarl.parallel import terminal
from megarl.parallel.bootstrap import World
from megarl.parallel.exchange import first_decides, from_first, gather_all
from megarl.policy import adam_state, checkpoint_tensors
from megarl.policy import digest as digests
from megarl.policy.fp8_linear import scalings
from megarl.policy.model import is_expert
from megarl.policy.policy import Policy


def save(
    policy: Policy,
    root: Path,
    step: int,
    progress: dict[str, Any],
    *,
    optimizer: bool,
    keep: int,
    keep_every: int = 0,
    beside: Callable[[Path], None] = lambda _: None,
) -> Path:
    """Save under `root/step_XXXXXX` and point `root/latest` at it; older ones go as in `checkpoint_folder.publish`.

    `beside` writes further files of this rank.

    Collective. With nothing written, raises on all ranks `Refusal` where the disk has no room for it, and
    `TrainingStopped` where updates were made and have left no trace in it.
    """
    final = root / f"step_{step:06d}"
    policy.bring_state()
    found = {name: digests.digest(trained.optimizer) for name, trained in policy.trained.items()}
    for name, trained in policy.trained.items():
        trained.movement.check(found[name], final.name, _of(name))
    partial = root / f"{final.name}.partial"
    if policy.world.is_first:
        # A save that was killed has taken room.
        checkpoint_folder.remove_unfinished(root)
    _require_room(policy, root, optimizer=optimizer)
    if policy.world.is_first:
        partial.mkdir()
    dist.barrier()
    names = policy.trained if optimizer else policy.own_sets
    state = checkpoint_tensors.weights_by_set(_modules_of(policy, names), megatron.CONTENT)
    state |= checkpoint_tensors.of_delayed_scaling(policy, names)
    if optimizer:
        state |= checkpoint_tensors.of_training(policy)
    # Megatron would start a process to hold the writers' results, for saves that go on behind the caller's back. It
    # takes seconds to start, and stays when this one is killed.
    writers: Any = filesystem_async
    writers._results_queue = writers._results_queue or queue.Queue()
    with _causes_named(), _system_errors_kept():
        dist_checkpointing.save(state, str(partial), content_metadata=dict(megatron.CONTENT))
    beside(partial)
    facts = {"step": step, "optimizer": optimizer} | _facts(found, optimizer=optimizer) | _of_adapter(policy)
    dist.barrier()
    written = from_first(checkpoint_folder.file_names(partial) if policy.world.is_first else [])
    mine = checksums.share(written, policy.world.rank, policy.world.size)
    parts = gather_all({name: checksums.measure(partial / name) for name in mine})
    if policy.world.is_first:
        model = policy.config.model
        facts["model_path"] = str(Path(model.path).resolve())
        facts["weights_path"] = None if model.weights is None else str(Path(model.weights).resolve())
        measured = {name: stored for part in parts for name, stored in part.items()}
        checkpoint_folder.write_progress(partial, policy.shape, progress | facts, measured)
        checkpoint_folder.publish(partial, final, keep=keep, keep_every=keep_every)
    dist.barrier()
    for name, trained in policy.trained.items():
        trained.movement.begin_from(found[name], final.name)
    return final


def load(policy: Policy, directory: Path, *, optimizer: bool) -> dict[str, Any]:
    """Load the policy's weights, all or an adapter's; with `optimizer` all sets that train, each with its optimizer's
    state and schedule.

    Returns the saved progress. Collective. Raises `Damaged` where the checkpoint is not whole; `Refusal` where it is of
    another model, lacks a set or an optimizer's state, or where the optimizers' weights or moments are not those that
    were saved.
    """
    progress = first_decides(lambda: _read_whole(directory))
    checkpoint_folder.check_model(directory, progress, policy.shape)
    implied = Implied(policy.config)
    policy.bring_state()
    checkpoint_folder.check_adapter(directory, progress, implied.adapter, implied.base_is_frozen, resumes=optimizer)
    if optimizer:
        checkpoint_folder.check_resumable(directory, progress)
        _check_sets(policy, directory, progress)
    _check_bytes(directory, progress, policy.world)
    _check_base(policy, directory, progress)
    # How the checkpoint names its tensors, which need not be how this version does.
    content = dist_checkpointing.load_content_metadata(str(directory)) or megatron.CONTENT
    modules = _modules_of(policy, policy.trained) if optimizer else checkpoint_tensors.modules_saved(policy, progress)
    template = checkpoint_tensors.weights_by_set(modules, content)
    template |= checkpoint_tensors.of_delayed_scaling(policy, modules)
    if optimizer:
        template |= checkpoint_tensors.scaling_of_base(policy, content)
    _begin_scaling(policy, template, directory)
    state = _read(template, directory)
    # Before the weights, which Transformer Engine may keep in FP8 by these factors.
    for name, scaling in checkpoint_tensors.delayed_scalings(policy, modules).items():
        scaling.load(checkpoint_tensors.of_set(state, name).get(checkpoint_tensors.SCALING, {}))
    if not optimizer:
        for name, parts in modules.items():
            _load_models(parts, checkpoint_tensors.of_set(state, name))
        adapter = policy.network.adapter
        if adapter is not None and not any(adapter in parts for parts in modules.values()):
            # The weights are a whole policy.
            adapter.clear()
        policy.weights_changed()
        return progress
    for key, model in checkpoint_tensors.by_key(policy.network.chunks).items():
        if checkpoint_tensors.SCALING + key in state:
            model.load_state_dict(state[checkpoint_tensors.SCALING + key], strict=False)
    for name, trained in policy.trained.items():
        of_set = checkpoint_tensors.of_set(state, name)
        _load_models(trained.modules, of_set)
        trained.scheduler.load_state_dict(of_set["scheduler"])
    found = _load_optimizers(policy, directory, content)
    _check_state(directory, progress, found)
    for name, trained in policy.trained.items():
        trained.movement.begin_from(found[name], directory.name)
    return progress


def _modules_of(policy: Policy, names: Iterable[str]) -> dict[str, Sequence[Any]]:
    """What trains on this rank, by the names of the sets."""
    return {name: policy.trained[name].modules for name in names}


def _load_optimizers(policy: Policy, directory: Path, content: dict[str, Any]) -> dict[str, digests.Digest]:
    """Read the optimizers' fp32 weights and moments to where they have them; gives digests of what they then have.

    After all else: weights in fp32 are the optimizer's own, and of bf16 ones that were saved it had finer. Collective.
    """
    parts = {name: adam_state.owned(trained.optimizer) for name, trained in policy.trained.items()}
    _read(
        {
            name: adam_state.boxes(parts[name], checkpoint_tensors.weights(trained.modules, content, name))
            for name, trained in policy.trained.items()
        },
        directory,
    )
    found = {}
    for name, trained in policy.trained.items():
        adam_state.loaded(parts[name], trained.scheduler.num_steps)
        # Those of a run without FP8 weights are not such yet.
        trained.network.round_weights()
        found[name] = digests.digest(trained.optimizer)
    return found


def _read(template: dict[str, Any], directory: Path) -> Any:
    """Fill the template's tensors from the checkpoint; gives what it asks for and all that is no tensor. Collective."""
    with _causes_named():
        return dist_checkpointing.load(template, str(directory), strict=StrictHandling.RAISE_UNEXPECTED)


def _facts(found: Mapping[str, digests.Digest], *, optimizer: bool) -> dict[str, Any]:
    """The digests as progress.json has them: the policy's own, and under "sets" those of the sets beside it, which are
    saved with the optimizers alone."""
    if not optimizer:
        return {"weights": found[POLICY].weights}
    by_set = {name: digest._asdict() for name, digest in found.items()}
    return by_set.pop(POLICY) | ({"sets": by_set} if by_set else {})


def _of_adapter(policy: Policy) -> dict[str, Any]:
    """What progress.json says of an adapter: that it is beside the weights that are saved, or, where it is saved alone,
    beside which weights it was trained. Collective."""
    adapter = Implied(policy.config).adapter
    if adapter is None:
        return {}
    if not policy.network.base_is_frozen:
        return {"beside": checkpoint_folder.adapter_facts(adapter)}
    base = {"base": policy.network.base_digest(), "precision": policy.config.params_dtype}
    return {"adapter": checkpoint_folder.adapter_facts(adapter) | base}


def _check_base(policy: Policy, directory: Path, progress: Mapping[str, Any]) -> None:
    saved = progress.get("adapter")
    # The same weights have other bits in another precision.
    if saved is not None and saved["precision"] == policy.config.params_dtype:
        found = policy.network.base_digest()
        if found != saved["base"]:
            raise Refusal(
                f"{directory} of an adapter",
                f"must be used with the weights that it was trained beside, of digest {saved['base']}, and these have "
                f"{found}",
                "set model.path, and model.weights where the run had it, to what it was trained with",
            )


def _check_sets(policy: Policy, directory: Path, progress: Mapping[str, Any]) -> None:
    saved, wanted = set(progress.get("sets", {})), policy.trained.keys() - {POLICY}
    if saved != wanted:
        raise Refusal(
            f"{directory}, {_with(saved)}",
            f"must have the parameter sets that the run trains beside the policy, and the run is one {_with(wanted)}",
            "continue with the algorithm that saved it, or start a new run with model.weights set to it",
        )


def _with(names: Collection[str]) -> str:
    """Which sets there are, in words."""
    return f"with the trained parameter sets {', '.join(sorted(names))}" if names else "without trained parameter sets"


def _of(name: str) -> str:
    """Whose weights or moments, as the end of a phrase; nothing where they are the policy's own."""
    return "" if name == POLICY else f" of the parameter set {name}"


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


def _check_state(directory: Path, progress: dict[str, Any], found: Mapping[str, digests.Digest]) -> None:
    for name, digest in found.items():
        saved = progress if name == POLICY else progress["sets"][name]
        for kind, got in digest._asdict().items():
            if saved[kind] != got:
                raise Refusal(
                    f"{directory} with {kind} {saved[kind]}{_of(name)}",
                    f"must give the optimizer the {kind} that were saved, and gave it {got}",
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


@contextmanager
def _system_errors_kept() -> Iterator[None]:
    """A file that could not be written is told by the system's own error, such as a full disk's.

    Torch raises one of its own in place of it, of which Megatron's writer passes on the type alone.
    """
    writer: Any = filesystem_async.FileSystemWriterAsync
    write = writer.write_preloaded_data

    def write_or_raise(*args: Any, **kwargs: Any) -> Any:
        written = write(*args, **kwargs)
        if isinstance(written[1], Exception):
            raise _system_error(written[1])
        return written

    writer.write_preloaded_data = staticmethod(write_or_raise)
    try:
        yield
    finally:
        writer.write_preloaded_data = staticmethod(write)


def _system_error(error: BaseException) -> BaseException:
    """The error of the system that led to `error`, which is itself where there is none."""
    return next((one for one in with_causes(error) if isinstance(one, OSError) and one.errno), error)


def _require_room(policy: Policy, root: Path, *, optimizer: bool) -> None:
    """Raise `Refusal` where the disk has less room than a checkpoint takes: what is there stays as it is."""
    grid = policy.grid
    ranks = grid.tensor * grid.context * grid.data
    needed = 0.0
    sets = policy.trained if optimizer else policy.own_sets
    for _, parameter in chain.from_iterable(policy.trained[name].named_parameters() for name in sets):
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


def _begin_scaling(policy: Policy, template: dict[str, Any], directory: Path) -> None:
    """Begin delayed scaling anew in all layers, and drop from the template what the checkpoint does not have of it: one
    of a run in another precision has none, one with another length of history has others. Collective."""
    layers = scalings(chain.from_iterable(trained.network.chunks for trained in policy.trained.values()))
    for one in (*layers, *checkpoint_tensors.delayed_scalings(policy, policy.trained).values()):
        one.begin_anew()
    stored: Any = dist_checkpointing.load_tensors_metadata(str(directory))
    shapes = {key: tuple(tensor.global_shape) for key, tensor in stored.items()}
    dropped = False
    for part in template.values():
        kept = [name for name in part if megatron.is_scaling(str(name))]
        absent = {name for name in kept if shapes.get(part[name].key) != tuple(part[name].global_shape)}
        for name in kept:
            # Factors go with the history that they are of.
            if name in absent or f"{name.rpartition('.')[0]}.history" in absent:
                del part[name]
        dropped |= bool(absent)
    if any(gather_all(dropped)) and policy.world.is_first:
        terminal.say(
            f"{directory.name} has no histories of FP8 amaxes that this run could continue: fp8-delayed begins with "
            "factors of 1"
        )


def _load_models(modules: Sequence[Any], state: dict[str, Any]) -> None:
    for key, model in checkpoint_tensors.by_key(modules).items():
        _load_model(model, state[key])


def _load_model(model: torch.nn.Module, state: dict[str, Any]) -> None:
    """Load every parameter. Transformer Engine's extra state is not saved, and FP8's scaling may have been dropped."""
    missing, unexpected = model.load_state_dict(state, strict=False)
    missing = [name for name in missing if not (megatron.is_extra_state(name) or megatron.is_scaling(name))]
    if missing or unexpected:
        raise Refusal(
            f"a checkpoint with {len(missing)} parameters missing and {len(unexpected)} unexpected "
            f"({', '.join([*missing, *unexpected][:3])})",
            "must hold exactly the model's parameters",
            "use a checkpoint of this model",
        )
