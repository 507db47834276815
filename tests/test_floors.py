"""Imports go down the floors: import-linter's contracts hold, and they notice a step upwards."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the contracts of `folder`/pyproject.toml over the megarl package in `folder`."""
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_contracts_hold() -> None:
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout
    assert "Contracts: 5 kept, 0 broken." in result.stdout


def test_a_step_upwards_is_noticed(tmp_path: Path) -> None:
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "megarl", tmp_path / "megarl", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "megarl" / "config" / "base.py").open("a") as file:
        file.write("\nimport torch\nimport megarl.policy\n")
    with (tmp_path / "megarl" / "train" / "__init__.py").open("a") as file:
        file.write("\nimport vllm\n")
    result = lint_imports(tmp_path)
    assert result.returncode == 1
    assert "Imports only go down the floors BROKEN" in result.stdout
    assert "Configuration, records and submission stay free of torch BROKEN" in result.stdout
    assert "vllm enters by rollout alone BROKEN" in result.stdout


def test_every_package_has_its_floor() -> None:
    floors = (ROOT / "pyproject.toml").read_text()
    packages = {path.parent.name for path in (ROOT / "megarl").glob("*/__init__.py")}
    missing = {name for name in packages if f"megarl.{name}" not in floors.split("layers = [")[1].split("]")[0]}
    assert not missing
