"""What the policy keeps: reference weights, checkpoints under other layouts, and itself when numbers are not finite."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import queue
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import parity
import pytest
import torch
from live_bytes import LiveBytes
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties

from megarl.errors import Refusal, TrainingStopped
from megarl.formats import checkpoint_folder, checksums, megatron

SAVED_UNDER = {"tensor": 2}
SAVED_MIXTURES_UNDER = {"tensor": 2, "sequence": True, "expert": 2}
#: Layouts of 4 and of 1 processes under which the checkpoint is loaded; the second is data parallel alone.
LOADED_UNDER = {
    4: [{"tensor": 2, "pipeline": 2}, {}, {"context": 2, "pipeline": 2, "virtual_pipeline": 2}],
    1: [{}],
}
MIXTURES_LOADED_UNDER = {
    4: [{"expert": 2, "expert_tensor": 2}, {"pipeline": 2, "virtual_pipeline": 2, "expert": 2}, {"context": 4}],
    1: [{}],
}
MIXTURES = ("qwen2-moe",)
MODELS = ("qwen2-tied", "qwen3-tied", "llama-llama3", *MIXTURES)
#: A schedule whose rate differs at every update: a run that loses its place shows.
SCHEDULE = {"warmup_steps": 2, "decay": "linear", "min_lr": 1e-4}


@dataclass
class Update:
    """An update's numbers and, on rank 0, the weights after it."""

    loss: float
    norm: float
    lr: float
    weights: dict[str, np.ndarray] | None


def config_for(path: Path, parallel: dict[str, Any]) -> Any:
    return parity.run_config(path, parallel=parallel, optimizer=SCHEDULE)


def made_batches(number: int) -> list:
    """Mini-batches with old and reference log-probs around -4.5, near a random model's."""
    plain = [parity.mini_batch(seed) for seed in range(number)]
    return [
        parity.with_old_log_probs(batch, [np.full(s.trained, -4.5) for s in batch], seed)
        for seed, batch in enumerate(plain)
    ]


def next_update(policy: Any, config: Any, batch: list, folder: Path) -> Update:
    result = parity.update(policy, parity.grpo(config), batch)
    return Update(result.loss, result.grad_norm, result.lr, parity.exported(policy, folder))


@contextmanager
def extra_states() -> Iterator[None]:
    """Inside, mixtures' layers speak of extra states as Transformer Engine's do: to Megatron's checkpoints of one for
    every expert, to PyTorch of one for all."""
    from megatron.core.transformer.utils import make_sharded_object_for_checkpoint

    from megarl.policy.cpu_layers import CpuGroupedLinear

    of_weights = CpuGroupedLinear.sharded_state_dict

    def of_all(self: Any, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        found = of_weights(self, prefix, sharded_offsets, metadata)
        experts = self.groups.ep.size() * self.num_gemms
        for index in range(self.num_gemms):
            expert = self.groups.ep.rank() * self.num_gemms + index
            found[f"{prefix}_extra_state{index or ''}"] = make_sharded_object_for_checkpoint(
                b"history",
                f"{prefix}_extra_state",
                (*sharded_offsets, (len(sharded_offsets), expert, experts)),
                (0, self.groups.expt_tp.rank(), self.groups.expt_dp.rank()),
            )
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CpuGroupedLinear, "sharded_state_dict", of_all)
        patch.setattr(CpuGroupedLinear, "get_extra_state", lambda self: b"history")
        patch.setattr(CpuGroupedLinear, "set_extra_state", lambda self, state: None)
        yield


@contextmanager
def gathered() -> Iterator[None]:
    """Inside, checkpoints have the optimizers' state as Megatron itself saves it, and megarl did before: gathered."""
    from megarl.policy import adam_state

    def boxes(parts: list[Any], of_model: dict[str, Any]) -> list[Any]:
        optimizers = {id(part.optimizer): part.optimizer for part in parts}.values()
        return [one.sharded_param_state_fully_reshardable(of_model, metadata=megatron.CONTENT) for one in optimizers]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adam_state, "boxes", boxes)
        yield


def memory_of(policy: Any) -> LiveBytes:
    """Looks at what is allocated beside the memory of a policy and its optimizer."""

    buffers = [
        buffer for chunk in policy.network.wrapped for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
    ]
    states = [tensor for part in parts_of(policy) for tensor in part.tensors.values()]
    return LiveBytes(*states, *(buffer.param_data for buffer in buffers))


def parts_of(policy: Any) -> list[Any]:
    """What this rank's optimizers own."""
    from megarl.policy import adam_state

    return adam_state.owned(policy.trained["policy"].optimizer)


def save_and_go_on(world: Any, folder: Path) -> dict[str, Any]:
    """Two updates, a checkpoint, a third update. A scenario of `run_world`."""
    from megarl.policy import checkpoint

    found = {}
    for model in MODELS:
        config = config_for(folder / model, SAVED_MIXTURES_UNDER if model in MIXTURES else SAVED_UNDER)
        batches = made_batches(3)
        with parity.policy_of(config, world) as policy:
            for batch in batches[:2]:
                parity.update(policy, parity.grpo(config), batch)
            with extra_states():
                checkpoint.save(policy, folder / f"{model}-saved", 2, {"cursor": 7}, optimizer=True, keep=2)
            with gathered():
                checkpoint.save(policy, folder / f"{model}-gathered", 2, {"cursor": 7}, optimizer=True, keep=2)
            weights = parity.exported(policy, folder / f"{model}-hf")
            found[model] = weights, next_update(policy, config, batches[2], folder / f"{model}-hf")
    return found


def load_and_go_on(world: Any, folder: Path) -> dict[str, Any]:
    """Load the checkpoint under each layout, save it again, and make the third update; one process loads what
    megatron-core 0.16 would have saved. And what loading and saving took of each rank. A scenario of `run_world`."""
    from megarl.parallel.exchange import gather_all
    from megarl.policy import checkpoint

    found = {}
    for model in MODELS:
        under = MIXTURES_LOADED_UNDER if model in MIXTURES else LOADED_UNDER
        for number, parallel in enumerate(under[world.size]):
            name = f"{model}-{world.size}-{number}"
            config = config_for(folder / model, parallel)
            with parity.policy_of(config, world, weights=False) as policy:
                root = folder / f"{model}-{'saved' if world.size > 1 else 'saved-by-0.16'}"
                saved = checkpoint_folder.require(root, "resume")
                # A GPU's checkpoint on the CPU, and back.
                with extra_states() if number else nullcontext(), memory_of(policy) as read:
                    progress = checkpoint.load(policy, saved, optimizer=True)
                weights = parity.exported(policy, folder / f"{name}-hf")
                with memory_of(policy) as written:
                    checkpoint.save(policy, folder / f"{name}-again", 2, progress, optimizer=True, keep=2)
                owned = sum(part.stop - part.start for part in parts_of(policy))
                shard = sum(parameter.numel() for _, parameter in policy.named_parameters())
                taken = gather_all((policy.grid.data_rank, owned, shard, read.peak, written.peak))
                update = next_update(policy, config, made_batches(3)[2], folder / f"{name}-hf")
                found[name] = model, progress, weights, update, taken
    return found


def read_plain(world: Any, roots: list[Path]) -> list[dict[str, np.ndarray]]:
    """All tensors of checkpoints by name, put together from their shards. A scenario of `run_world`."""
    from megatron.core.dist_checkpointing import load_plain_tensors

    return [dict(flat(load_plain_tensors(str(root / "step_000002")))) for root in roots]


def flat(state: Any, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of nested dictionaries and lists by dotted name."""
    if hasattr(state, "numpy"):
        yield prefix, state.numpy()
    elif isinstance(state, dict | list):
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            yield from flat(value, f"{prefix}.{key}" if prefix else str(key))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("state")
    for model in MODELS:
        parity.write_model(folder, model)
    return folder


@pytest.fixture(scope="module")
def saved(folder: Path) -> dict[str, Any]:
    """Of each model: weights when saved, and the third update, under the layout it was saved in."""
    return parity.run_world("test_policy_state", "save_and_go_on", 4, folder)[0]


def rewrite_as_0_16(root: Path, copy: Path) -> None:
    """Copy a checkpoints folder as megatron-core 0.16 laid checkpoints out: what is no tensor lies in common.pt."""
    shutil.copytree(root, copy)
    directory = copy / "step_000002"
    index = pickle.loads((directory / ".metadata").read_bytes())
    del index.state_dict_metadata[megatron.COMMON]
    place = index.storage_data.pop(MetadataIndex(megatron.COMMON))
    content = (directory / place.relative_path).read_bytes()[place.offset : place.offset + place.length]
    (common,) = torch.load(io.BytesIO(content))
    torch.save(common, directory / "common.pt")
    (directory / ".metadata").write_bytes(pickle.dumps(index))
    backend = {"common_backend": "torch", "common_backend_version": 1}
    (directory / "metadata.json").write_text(json.dumps(megatron.BACKEND | backend))
    names = checkpoint_folder.file_names(directory)
    rewrite_note(copy, files={name: checksums.measure(directory / name)._asdict() for name in names})


@pytest.fixture(scope="module")
def loaded(folder: Path, saved: dict[str, Any]) -> dict[str, Any]:
    """The same after loading under every layout of `LOADED_UNDER`."""
    for model in MODELS:
        rewrite_as_0_16(folder / f"{model}-gathered", folder / f"{model}-saved-by-0.16")
    found = {}
    for processes in LOADED_UNDER:
        found |= parity.run_world("test_policy_state", "load_and_go_on", processes, folder)[0]
    return found


def test_scaling_is_told_from_parameters_by_the_end_of_its_keys():
    ends = ("scaling.history", "scaling12.factors", "scaling_fwd.history", "scaling_bwd.factors")
    assert all(megatron.is_scaling(f"decoder.layers.0.mlp.linear_fc1.{end}") for end in ends)
    others = ("scaling_fwd.weight", "rescaling.history", "scaling_fwd", "scaling_out.history")
    assert not any(megatron.is_scaling(f"decoder.layers.0.mlp.linear_fc1.{end}") for end in others)


def test_extra_states_are_told_from_parameters_by_the_end_of_their_keys():
    states = ("_extra_state", "decoder.layers.0.mlp.experts.linear_fc1._extra_state", "a.linear_fc2._extra_state127")
    assert all(map(megatron.is_extra_state, states))
    others = ("decoder.layers.0.mlp.experts.linear_fc1.weight1", "a._extra_state.weight", "a.no_extra_state")
    assert not any(map(megatron.is_extra_state, others))


def test_loaded_weights_are_bitwise_the_saved_ones(saved: dict, loaded: dict):
    assert len(loaded) == len(MODELS) * sum(map(len, LOADED_UNDER.values()))
    for name, (model, progress, weights, *_) in loaded.items():
        assert progress["step"] == 2 and progress["cursor"] == 7
        expected = saved[model][0]
        assert set(weights) == set(expected)
        assert not [key for key in expected if not np.array_equal(weights[key], expected[key])], name


def test_the_update_after_loading_is_the_one_after_saving(saved: dict, loaded: dict):
    """To rounding: other layouts sum in another order. Without moments Adam's step would be several times as long."""
    for name, (model, _, _, update, _) in loaded.items():
        weights, expected = saved[model]
        assert update.lr == expected.lr
        assert update.loss == pytest.approx(expected.loss, rel=1e-5)
        assert update.norm == pytest.approx(expected.norm, rel=1e-5)
        for key, value in expected.weights.items():
            change = np.linalg.norm(value - weights[key])
            assert np.linalg.norm(update.weights[key] - value) < 1e-4 * change, f"{name}: {key}"
            assert np.abs(update.weights[key] - value).max() < 1e-5 * np.abs(value).max(), f"{name}: {key}"


def test_moments_come_back_bitwise(folder: Path, loaded: dict):
    """What is saved again right after loading is, tensor by tensor, what was loaded, fp32 weights and both moments, and
    what Megatron saves of the same optimizer."""
    roots = [folder / f"{model}-saved" for model in MODELS]
    copies: dict[Path, str] = {folder / f"{model}-gathered": model for model in MODELS}
    copies |= {folder / f"{name}-again": model for name, (model, *_) in loaded.items()}
    found = parity.run_world("test_policy_state", "read_plain", 1, [*roots, *copies])[0]
    first: dict[str, Any] = dict(zip(MODELS, found, strict=False))
    for (root, model), tensors in zip(copies.items(), found[len(MODELS) :], strict=True):
        assert set(tensors) == set(first[model])
        assert not [key for key in tensors if not np.array_equal(tensors[key], first[model][key])], root.name
    for tensors in first.values():
        weights = {key for key in tensors if not key.startswith("optimizer.")}
        for kind in ("param", "exp_avg", "exp_avg_sq"):
            assert {f"optimizer.state.{kind}.{key}" for key in weights} < set(tensors)
            assert all(np.abs(tensors[f"optimizer.state.{kind}.{key}"]).max() > 0 for key in weights)


def test_no_rank_takes_memory_for_more_of_the_optimizers_state_than_it_owns(loaded: dict):
    """Beside what policy and optimizer have. Data parallel 4 owns a quarter of the shard; the weights are written by
    the first of a shard's ranks, and all read them."""
    for name, (*_, taken) in loaded.items():
        for data_rank, owned, shard, read, written in taken:
            assert written <= 12 * owned + (4 * shard if data_rank == 0 else 0), (name, taken)
            assert read <= 4 * shard, (name, taken)


@pytest.fixture
def root(folder: Path, saved: dict, tmp_path: Path) -> Path:
    """A checkpoints folder with steps 1 and 2, to be damaged."""
    for step in (1, 2):
        shutil.copytree(folder / "qwen2-tied-saved" / "step_000002", tmp_path / f"step_00000{step}")
    (tmp_path / "latest").write_text("step_000002")
    return tmp_path


def lose_progress(directory: Path) -> None:
    (directory / "progress.json").unlink()


def tear_progress(directory: Path) -> None:
    text = (directory / "progress.json").read_text()
    (directory / "progress.json").write_text(text[: len(text) // 2])


def truncate(directory: Path) -> None:
    largest = max(directory.glob("*.distcp"), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-100])


def flip_bit(directory: Path) -> None:
    largest = max(directory.glob("*.distcp"), key=lambda file: file.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)


def lose_file(directory: Path) -> None:
    next(directory.glob("*.distcp")).unlink()


DAMAGES = {
    lose_progress: "has no progress.json",
    tear_progress: "progress.json that cannot be read",
    truncate: r"bytes of its file __\d_\d.distcp",
    lose_file: r"has lost its file __\d_\d.distcp",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_checkpoints_give_way_to_the_one_before_or_are_refused(root: Path, damage: Any):
    assert checkpoint_folder.find(root) == checkpoint_folder.find(root / "step_000002") == root / "step_000002"
    damage(root / "step_000002")
    assert checkpoint_folder.find(root) == root / "step_000001"
    with pytest.raises(Refusal, match=f"step_000002: must be a complete checkpoint, but .*{DAMAGES[damage]}"):
        checkpoint_folder.require(root / "step_000002", "model.weights")
    damage(root / "step_000001")
    with pytest.raises(Refusal, match=DAMAGES[damage]):
        checkpoint_folder.find(root)


def test_unfinished_and_later_checkpoints_are_not_found(root: Path, tmp_path: Path):
    """What is still being written, and what an earlier run of that name left beyond `latest`."""
    shutil.copytree(root / "step_000002", root / "step_000001.partial")
    (root / "latest").write_text("step_000001")
    assert checkpoint_folder.find(root) == root / "step_000001"
    assert checkpoint_folder.find(tmp_path / "nothing") is None
    (root / "latest").unlink()
    assert checkpoint_folder.find(root) == root / "step_000002"
    with pytest.raises(Refusal, match=r"model.weights=.*nothing: must be a checkpoint"):
        checkpoint_folder.require(tmp_path / "nothing", "model.weights")


def refusals(world: Any, cases: list[tuple[Path, Path, bool]]) -> list[str]:
    """What loading says, case by case: model, checkpoint, with the optimizer or not; the policy keeps its weights, but
    for the last case. At the end what saving says where the disk is full. A scenario of `run_world`."""
    from megarl.policy import checkpoint

    said = []
    for model, root, optimizer in cases:
        with parity.policy_of(config_for(model, {}), world) as policy:
            before = parity.exported(policy, root.parent / "refused-hf")
            try:
                checkpoint.load(policy, checkpoint_folder.require(root, "resume"), optimizer=optimizer)
            except Refusal as refusal:
                said.append(str(refusal))
            after = parity.exported(policy, root.parent / "refused-hf")
            assert before is not None and after is not None
            if root != cases[-1][1]:
                assert all(np.array_equal(before[name], after[name]) for name in before)
    with parity.policy_of(config_for(cases[0][0], {}), world) as policy:
        free = shutil.disk_usage
        shutil.disk_usage = lambda path: free(path)._replace(free=100_000)
        try:
            checkpoint.save(policy, cases[-1][1], 3, {}, optimizer=True, keep=1)
        except Refusal as refusal:
            said.append(str(refusal))
        shutil.disk_usage = free
    return said + without_trace(world, cases[0][0], cases[-1][1])


def without_trace(world: Any, model: Path, root: Path) -> list[str]:
    """What saving says after updates that did not move the weights, and where the moments are lost."""
    from megarl.policy import checkpoint

    said = []
    config = parity.run_config(model)
    first, second, third = made_batches(3)

    def save(policy: Any, step: int) -> None:
        try:
            checkpoint.save(policy, root, step, {}, optimizer=True, keep=9)
        except TrainingStopped as stopped:
            said.append(str(stopped))

    with parity.policy_of(config, world) as policy:
        step = policy.trained["policy"].optimizer.step_with_ready_grads
        policy.trained["policy"].optimizer.step_with_ready_grads = lambda: None
        parity.update(policy, parity.grpo(config), first)
        save(policy, 3)
        policy.trained["policy"].optimizer.step_with_ready_grads = step
        parity.update(policy, parity.grpo(config), first)
        save(policy, 4)
        # Nothing that should have moved the weights has happened since.
        save(policy, 5)
        policy.trained["policy"].optimizer.param_groups[0]["lr"] = 0.0
        parity.update(policy, parity.grpo(config), second)
        save(policy, 6)
        policy.trained["policy"].optimizer.step_with_ready_grads = lambda: None
        parity.update(policy, parity.grpo(config), second)
        parity.update(policy, parity.grpo(config), third)
        save(policy, 7)
        policy.trained["policy"].optimizer.step_with_ready_grads = step
        parity.update(policy, parity.grpo(config), third)
        for adam in policy.trained["policy"].optimizer.chained_optimizers:
            for state in adam.optimizer.state.values():
                state["exp_avg"].zero_()
                state["exp_avg_sq"].zero_()
        save(policy, 8)
    return said


def altered(root: Path, name: str, **notes: Any) -> Path:
    """A copy of a checkpoints folder whose newest checkpoint has other notes."""
    copy = root.with_name(f"{root.name}-{name}")
    shutil.copytree(root, copy)
    rewrite_note(copy, **notes)
    return copy


def rewrite_note(root: Path, **notes: Any) -> None:
    """Change what progress.json says, and leave out its checksum."""
    note = root / "step_000002" / "progress.json"
    content = json.loads(note.read_text()) | notes
    del content["checksum"]
    note.write_text(json.dumps(content))


def test_checkpoints_of_other_models_damaged_or_without_moments_are_refused(folder: Path, root: Path):
    flipped = altered(root, "flipped")
    flip_bit(flipped / "step_000002")
    dropped = altered(root, "dropped", moments={"exp_avg": "0" * 16, "exp_avg_sq": "0" * 16})
    # What a save that was killed has left takes no room from the next.
    (dropped / "step_000007.partial").mkdir()
    qwen2 = folder / "qwen2-tied"
    cases = [
        (folder / "qwen3-tied", folder / "qwen2-tied-saved", False),
        (qwen2, altered(root, "bare", optimizer=False), True),
        (qwen2, flipped, False),
        (qwen2, dropped, True),
    ]
    other, bare, bit, moments, full, *traceless = parity.run_world("test_policy_state", "refusals", 1, cases)[0]
    assert "of a model with family=qwen2: must be of the model in config.json, which has family=qwen3" in other
    assert "was saved without the optimizer's state" in bare
    assert re.search(r"but has other bytes in its file __\d_\d.distcp than were saved. Fix: copy it again", bit)
    assert "must give the optimizer the moments that were saved, and gave it {'exp_avg': '" in moments
    assert re.search(r"with 0.00 GB free: must have room for a checkpoint, 0.00 GB; nothing was written or rem", full)
    start, since, zero = traceless
    assert start.startswith(
        "step_000003 was not saved: its weights are bit for bit those of the start of the run, after 1 "
    )
    assert since.startswith(
        "step_000007 was not saved: its weights are bit for bit those of step_000006, after 2 update(s)"
    )
    assert zero.startswith("step_000008 was not saved: all of Adam's moments are zero after updates with a gradient")
    kept = [f"step_{step:06d}" for step in (1, 2, 4, 5, 6)]
    assert sorted(path.name for path in dropped.iterdir()) == ["latest", *kept]
    assert (dropped / "latest").read_text() == "step_000006"


def test_old_checkpoints_go_but_for_the_newest_and_every_so_many(root: Path):
    """Also those that were being written when a run was killed; a checkpoint is replaced by one of the same step."""
    whole = shutil.copytree(root / "step_000001", root.parent / "whole")
    for step in (3, 4, 5, 6):
        partial = root / f"step_{step:06d}.partial"
        shutil.copytree(whole, partial)
        (root / "step_000004.partial.replaced").mkdir(exist_ok=True)
        checkpoint_folder.publish(partial, root / f"step_{step:06d}", keep=2, keep_every=3)
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step_000003", "step_000005", "step_000006"]
    # What lies beyond, and this run did not continue from, is none of those that are kept.
    beyond = shutil.copytree(whole, root / "step_000009")
    shutil.copytree(whole, root / "step_000007.partial")
    checkpoint_folder.publish(root / "step_000007.partial", root / "step_000007", keep=2, keep_every=0)
    assert {"step_000006", "step_000007", "step_000009"} < {path.name for path in root.iterdir()}
    for gone in (beyond, root / "step_000007"):
        shutil.rmtree(gone)
    again = root / "step_000006.partial"
    shutil.copytree(whole, again)
    (again / "new").touch()
    checkpoint_folder.publish(again, root / "step_000006", keep=1, keep_every=0)
    assert sorted(path.name for path in root.iterdir()) == ["latest", "step_000006"]
    assert (root / "step_000006" / "new").exists() and (root / "latest").read_text() == "step_000006"


def test_a_file_that_cannot_be_written_is_told_by_the_systems_own_error():
    """Torch and Megatron's writer would say `unexpected pos` and the type of an error."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync as Writer
    from torch.distributed.checkpoint.filesystem import _StorageWriterTransforms
    from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

    from megarl.policy.checkpoint import _system_errors_kept

    tensor = torch.zeros(1 << 16)
    shape = torch.Size([1 << 16])
    chunk = ChunkStorageMetadata(torch.Size([0]), shape)
    data = TensorWriteData(chunk, TensorProperties(dtype=tensor.dtype), shape)
    item = WriteItem(MetadataIndex("weight"), WriteItemType.TENSOR, tensor_data=data)
    plain = Writer.write_preloaded_data
    results: Any = queue.Queue()
    with _system_errors_kept():
        bucket: Any = ("/dev/full", "full", ([], [(item, tensor)]))
        Writer.write_preloaded_data_multithread([_StorageWriterTransforms()], False, 0, [bucket], results)
    assert os.strerror(errno.ENOSPC) in str(results.get())
    assert Writer.write_preloaded_data is plain
