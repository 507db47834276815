"""What launch/setup.sh rests on: the locks, and the extension that is compiled once and found again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LOCKS = ROOT / "requirements"

#: An extension that says how it was built: the environment, written into its wheel.
RECORDER = """
import json, os
from setuptools import setup

open("seen.py", "w").write("SEEN = " + repr(json.dumps(dict(os.environ))))
setup(name="transformer-engine-torch", version="9.9", py_modules=["seen"])
"""


def run(script: str, *arguments: object, **environment: object) -> subprocess.CompletedProcess[str]:
    """Runs `script` with the functions of launch/extension.sh."""
    return subprocess.run(
        ["bash", "-c", f"set -euo pipefail; source launch/extension.sh; {script}", "bash", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {name: str(value) for name, value in environment.items()},
        capture_output=True,
        text=True,
        timeout=120,
    )


def out(script: str, *arguments: object, **environment: object) -> str:
    done = run(script, *arguments, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def version(lock: str, package: str) -> str:
    return out('locked "$@"', LOCKS / lock, package)


def test_versions_of_a_lock() -> None:
    assert version("cpu.lock", "torch") == version("gpu.lock", "torch") + "+cpu"
    assert version("cpu.lock", "transformer-engine-torch") == ""
    # Not those of packages whose names merely begin or end alike.
    assert version("gpu.lock", "transformer-engine-torch") == version("gpu.lock", "transformer-engine")


def test_no_cpu_build_passes_for_the_gpu_locks_torch() -> None:
    """Two equals signs take 2.13.0+cpu for 2.13.0, from a folder of wheels or where it is installed already."""
    lines = (LOCKS / "gpu.lock").read_text().splitlines()
    assert [line for line in lines if line.startswith("torch=")] == ["torch===" + version("gpu.lock", "torch")]


def test_cudas_two_bindings_are_of_one_version() -> None:
    """Each installs modules over the other's: of two versions, neither can be imported."""
    assert version("gpu.lock", "cuda-python") == version("gpu.lock", "cuda-bindings") != ""


def test_an_extension_is_kept_by_what_it_is_compiled_against(tmp_path: Path) -> None:
    lock = tmp_path / "lock"

    def folder(te: str = "2.11.0", torch: str = "2.13.0", kind: str = "cp311-x86_64", cudnn: str = "9.20") -> str:
        lock.write_text(f"nvidia-cudnn-cu13=={cudnn}\ntorch==={torch}\ntransformer-engine-torch=={te}\nzstd==1.5\n")
        return out('extension_folder "$@"', lock, kind, MEGARL_CACHE=tmp_path)

    assert folder().startswith(f"{tmp_path}/wheels/transformer-engine-torch-2.11.0-torch-2.13.0-cp311-x86_64-")
    others = {folder(te="2.12.0"), folder(torch="2.14.0"), folder(kind="cp312-x86_64"), folder(cudnn="9.21")}
    assert len({folder(), *others}) == 5
    assert folder() == folder()
    here = f"cp{sys.version_info.major}{sys.version_info.minor}-{os.uname().machine}"
    assert out('python_kind "$@"', sys.executable) == here
    assert run('extension_folder "$@"', lock, here, MEGARL_CACHE="", HOME="/home/x").stdout.startswith(
        "/home/x/.cache/megarl/wheels/"
    )


@pytest.mark.parametrize(
    ("cores", "gigabytes", "jobs"), [(2, 24, 2), (64, 24, 6), (8, 3, 1), (1, 500, 1), (16, 500, 16)]
)
def test_compilers_side_by_side(cores: int, gigabytes: int, jobs: int) -> None:
    assert out('jobs_for "$@"', cores, gigabytes * 10**6) == str(jobs)


def test_what_a_compilation_lacks_is_said_before_it(tmp_path: Path) -> None:
    done = run('can_compile "$@"', sys.executable, CXX="no-such-compiler")
    assert done.returncode == 1
    assert done.stderr == (
        "setup: transformer-engine-torch is compiled by no-such-compiler, which is missing; on Debian and Ubuntu "
        "install g++\n"
    )
    without_headers = tmp_path / "python"
    without_headers.write_text("#!/bin/sh\necho /nowhere\n")
    without_headers.chmod(0o755)
    done = run('can_compile "$@"', without_headers, CXX="sh")
    assert (done.returncode, "/nowhere/Python.h, which is missing" in done.stderr) == (1, True)
    assert run('can_compile "$@"', sys.executable, CXX="sh").returncode == 0


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder that holds the source of version 9.9 of the extension, as an index would give it."""
    name = "transformer_engine_torch-9.9"
    (tmp_path / name).mkdir()
    (tmp_path / name / "setup.py").write_text(RECORDER)
    (tmp_path / name / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: transformer-engine-torch\nVersion: 9.9\n")
    subprocess.run(["tar", "-czf", f"{name}.tar.gz", name], cwd=tmp_path, check=True)
    return tmp_path


def compile_into(folder: Path, source: Path, **environment: object) -> subprocess.CompletedProcess[str]:
    return run(
        'compile_extension "$1" 9.9 "$2"; wheel_in "$2"',
        sys.prefix,
        folder,
        **{"PIP_NO_INDEX": 1, "PIP_FIND_LINKS": source, "PIP_CONFIG_FILE": os.devnull} | environment,
    )


def test_an_extension_is_compiled_with_the_headers_of_the_wheels(tmp_path: Path, source: Path) -> None:
    kept = tmp_path / "kept"
    assert run('wheel_in "$@"', kept).returncode == 1
    done = compile_into(kept, source, CUDA_HOME="/usr/local/cuda", CPATH="/opt/include", OMP_NUM_THREADS=64)
    assert done.returncode == 0, done.stderr
    (wheel,) = kept.iterdir()
    assert done.stdout.strip() == str(wheel) and wheel.suffix == ".whl"
    # It is found again: what setup.sh asks before it compiles.
    assert out('wheel_in "$@"', kept) == str(wheel)

    seen: dict[str, str] = {}
    exec(zipfile.ZipFile(wheel).read("seen.py"), seen)
    built = json.loads(seen["SEEN"])
    nvidia = f"{sysconfig.get_paths()['purelib']}/nvidia"
    assert built["CUDA_HOME"] == f"{nvidia}/cu13"
    assert built["CPATH"] == f"{nvidia}/cu13/include:{nvidia}/cudnn/include:{nvidia}/nccl/include:/opt/include"
    assert built["NVTE_PYTORCH_FORCE_BUILD"] == "TRUE"
    assert 1 <= int(built["MAX_JOBS"]) <= len(os.sched_getaffinity(0))
    assert built["PATH"].split(":")[0] == f"{sys.prefix}/bin"


def test_a_compilation_that_fails_says_why_and_leaves_nothing(tmp_path: Path, source: Path) -> None:
    kept = tmp_path / "kept"
    broken = source / "transformer_engine_torch-9.9" / "setup.py"
    broken.write_text("raise SystemExit('cusparse.h: No such file or directory')")
    subprocess.run(["tar", "-czf", f"{broken.parent.name}.tar.gz", broken.parent.name], cwd=source, check=True)
    done = compile_into(kept, source)
    assert done.returncode == 1
    assert "cusparse.h: No such file or directory" in done.stderr
    assert list(kept.iterdir()) == []


def test_a_compilation_that_is_stopped_leaves_nothing(tmp_path: Path, source: Path) -> None:
    kept = tmp_path / "kept"
    package = source / "transformer_engine_torch-9.9"
    (package / "setup.py").write_text("import time\ntime.sleep(60)")
    subprocess.run(["tar", "-czf", f"{package.name}.tar.gz", package.name], cwd=source, check=True)
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(source), "PIP_CONFIG_FILE": os.devnull}
    compiling = subprocess.Popen(
        ["bash", "-c", 'source launch/extension.sh; compile_extension "$@"', "bash", sys.prefix, "9.9", str(kept)],
        cwd=ROOT,
        env=os.environ | offline,
        start_new_session=True,
    )
    for _ in range(600):
        if list(kept.glob("built.*/log")):
            break
        time.sleep(0.05)
    assert len(list(kept.iterdir())) == 1
    os.killpg(compiling.pid, signal.SIGINT)
    compiling.wait(30)
    assert list(kept.iterdir()) == []


@pytest.mark.parametrize("own", [False, True])
def test_the_wheels_compiler_serves_where_there_is_no_toolkit(tmp_path: Path, own: bool) -> None:
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "environment.sh").write_text((ROOT / "launch" / "environment.sh").read_text())
    toolkit = tmp_path / ".venv" / "lib" / "python3.12" / "site-packages" / "nvidia" / "cu13"
    (toolkit / "bin").mkdir(parents=True)
    (toolkit / "bin" / "nvcc").touch(mode=0o755)
    # Only what the script itself needs, so that no nvcc of this machine is found.
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("dirname", "bash"):
        (tools / name).symlink_to(f"/usr/bin/{name}")
    done = subprocess.run(
        ["/usr/bin/bash", "-c", f"source {tmp_path}/launch/environment.sh; echo $CUDA_HOME"],
        env={"PATH": str(tools)} | ({"CUDA_HOME": "/opt/cuda"} if own else {}),
        capture_output=True,
        text=True,
        check=True,
    )
    # A toolkit at the usual place would come first.
    expected = "" if Path("/usr/local/cuda/bin/nvcc").exists() else str(toolkit)
    assert done.stdout.strip() == ("/opt/cuda" if own else expected)
