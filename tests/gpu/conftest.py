"""Tests that a GPU alone can answer; skipped where there is none. launch/gpu_check.sh runs them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="session")
def world() -> Iterator[Any]:
    """A world of this process alone."""
    from megarl.parallel import bootstrap
    from megarl.rollout import vllm_setup

    vllm_setup.prepare()
    yield bootstrap.join()


@pytest.fixture
def figure() -> Callable[..., None]:
    """Keeps a number for the table: its name, the number, its unit and the bar, where it has one."""

    def keep(name: str, value: float, unit: str, bar: str = "") -> None:
        line = json.dumps({"name": name, "value": value, "unit": unit, "bar": bar})
        print(line)
        if folder := os.environ.get("MEGARL_GPU_RESULTS"):
            with Path(folder, "figures.jsonl").open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    return keep
