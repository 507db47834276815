"""NVIDIA's libraries, told apart from what merely has their names and from what is there by half."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

import pytest
import torch

from megarl.config import accelerations
from megarl.train import installation
from megarl.train.installation import Fact

LACKING = (
    "lacks its extension for PyTorch, transformer_engine_torch, without which Megatron-core cannot be imported{} "
    "run launch/setup.sh with MEGARL_LOCK=gpu, which builds it, or uninstall Transformer Engine"
)
WITHOUT_APEX = "not needed: Transformer Engine's fused Adam is used"


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of installed packages before all others; none of NVIDIA's is there already."""
    for name in ("transformer_engine", "apex", "amp_C"):
        if importlib.util.find_spec(name) is not None:
            pytest.skip(f"{name} is installed")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def install(packages: Path, name: str, version: str | None = None) -> Path:
    """A package of this name and the version it says it has; gives its folder."""
    folder = packages / name
    folder.mkdir()
    (folder / "__init__.py").write_text("raise FileNotFoundError")
    if version is not None:
        notes = packages / f"{name}-{version}.dist-info"
        notes.mkdir()
        (notes / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    importlib.invalidate_caches()
    return folder


def found(name: str) -> list[Fact]:
    return [fact for fact in installation.facts() if fact.name == name]


def with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        total_memory = 80 << 30

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda number: "H100")
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda number: Properties)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda number: (9, 0))
    monkeypatch.setattr(installation, "nccl_version", lambda: "2")


@pytest.mark.parametrize("gpu", [False, True])
def test_a_missing_extension_is_one_sentence_with_and_without_a_gpu(
    packages: Path, gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    if gpu:
        with_a_gpu(monkeypatch)
    missing = [Fact("Transformer Engine", None, "policies on GPUs need it: install megarl[gpu]")]
    assert found("Transformer Engine") == (missing if gpu else [])
    assert list(accelerations.refusals()) == []
    folder = install(packages, "transformer_engine", "2.11.0")
    assert found("Transformer Engine") == [Fact("Transformer Engine", None, LACKING.format(":"))]
    assert [str(one) for one in accelerations.refusals()] == [
        f"Transformer Engine: {LACKING.format('. Fix:')}.",
    ]
    if gpu:
        assert found("FP8")[0].found is None
    # A C++ library of its own is not the extension.
    (folder / "libtransformer_engine.so").touch()
    assert len(list(accelerations.refusals())) == 1


@pytest.mark.parametrize("below", ["", "transformer_engine", "transformer_engine/wheel_lib"])
def test_an_extension_is_found_where_transformer_engine_looks(
    packages: Path, below: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    install(packages, "transformer_engine", "2.11.0")
    (packages / below).mkdir(exist_ok=True)
    (packages / below / "transformer_engine_torch.cpython-311-x86_64-linux-gnu.so").touch()
    assert list(accelerations.refusals()) == []
    assert found("Transformer Engine") == [Fact("Transformer Engine", "2.11.0")]


def test_the_indexs_apex_is_not_nvidias(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_a_gpu(monkeypatch)
    assert found("apex") == [Fact("apex", None, WITHOUT_APEX)]
    install(packages, "apex", "0.9.10")
    assert found("apex") == [
        Fact("apex", None, f"apex 0.9.10 is not NVIDIA's, or was built without its kernels: {WITHOUT_APEX}")
    ]
    (packages / "amp_C.py").touch()
    importlib.invalidate_caches()
    assert found("apex") == [Fact("apex", "0.9.10")]


def test_the_compilers_of_kernels_are_looked_for_where_vllm_looks(
    packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_a_gpu(monkeypatch)
    for name in ("nvcc", "ninja", "g++"):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text("#!/bin/sh")
        (tmp_path / "bin" / name).chmod(0o755)
    for name in ("CUDA_PATH", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    paths = ", ".join(f"{tmp_path}/bin/{name}" for name in ("nvcc", "g++", "ninja"))
    assert found("compilers") == [Fact("compilers", paths)]
    # CUDA_HOME counts before the PATH.
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "none"))
    lacking = "no nvcc: FP8 engines and fused all-reduce compile kernels"
    monkeypatch.setattr(accelerations, "wheels_toolkit", lambda: None)
    assert found("compilers") == [Fact("compilers", None, lacking)]
    monkeypatch.setattr(accelerations, "wheels_toolkit", lambda: tmp_path)
    assert found("compilers") == [Fact("compilers", None, f"{lacking}; set CUDA_HOME={tmp_path}, which has one")]
    monkeypatch.delenv("CUDA_HOME")
    (tmp_path / "bin" / "ninja").unlink()
    monkeypatch.setenv("CXX", "clang++")
    assert found("compilers")[0].meaning.startswith("no C++, ninja: ")


def test_a_build_for_cuda_without_a_gpu_is_a_login_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.version.cuda", "13.0")
    says = "PyTorch is built for CUDA 13.0: check, plan and submit work here, runs do not"
    assert found("CUDA") == [Fact("CUDA", None, says)]
    monkeypatch.setattr("torch.version.cuda", None)
    assert found("CUDA")[0].meaning.startswith("policy and engines run on the CPU")


def test_a_machine_without_either_is_told_of_cuda_alone(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert found("Transformer Engine") == found("apex") == []
    assert torch.version.cuda is None or found("CUDA")
