"""A whole run on disk for tests: arithmetic data, tokenizer and a tiny model made by tools/, and its YAML file."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import preloaded
import yaml

TESTS = Path(__file__).resolve().parent


def digit_share(text: str, answer: str, source: str) -> float:
    """A reward that a random model earns unevenly: the share of digits in its answer."""
    return sum(character.isdigit() for character in text) / max(1, len(text))


def even_length(text: str, answer: str, source: str) -> float:
    """A reward of 0 or 1 that depends on no skill, so that there are always both."""
    return float(len(text) % 2 == 0)


@functools.cache
def _inputs() -> tempfile.TemporaryDirectory[str]:
    """A folder with what `write_inputs` copies, removed with the session."""
    kept = tempfile.TemporaryDirectory(prefix="inputs-")
    for tool in (
        "make_arithmetic --out data --train 48 --heldout 8",
        "train_tokenizer --input data/train.jsonl --vocab-size 300 --out tokenizer",
        "make_tiny_model --out model --tokenizer tokenizer --tied --hidden 64 --layers 2 --heads 2 --kv-heads 1",
    ):
        name, *arguments = tool.split()
        script = TESTS.parent / "tools" / f"{name}.py"
        subprocess.run([sys.executable, str(script), *arguments], cwd=kept.name, check=True, capture_output=True)
    return kept


def write_inputs(folder: Path) -> None:
    """data/, tokenizer/ and model/ in `folder`: 48 problems, a Qwen2 of 2 layers and 2 heads of 32 elements."""
    shutil.copytree(_inputs().name, folder, dirs_exist_ok=True)


def write_run(folder: Path, **changes: Any) -> Path:
    """A YAML file of a run with the inputs in `folder`; `changes` replace top-level keys."""
    run: dict[str, Any] = {
        "name": "run",
        "steps": 6,
        "seed": 3,
        "precision": "fp32",
        "model": {"path": "model"},
        "algorithm": {"name": "grpo"},
        "data": {
            "path": "data/train.jsonl",
            "answer_column": "answer",
            "solution_column": "solution",
            "max_prompt_tokens": 32,
        },
        "rollout": {"group_size": 4, "max_tokens": 16, "kv_cache_gib": 0.02},
        "reward": {"kind": "arithmetic_run:digit_share", "time_limit": 60.0, "workers": 1},
        "batch": {"prompts": 6, "tokens_per_microbatch": 192},
        "optimizer": {"lr": 1e-3},
        "logging": {"tensorboard": False, "samples": 8},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run | changes))
    return path


def start(folder: Path, *arguments: str) -> preloaded.Started:
    """`megarl ARGUMENTS` in `folder`, in a process group of its own."""
    return preloaded.megarl(folder, *arguments)


def finish(process: preloaded.Started) -> str:
    """Wait for a run that must succeed; returns what it printed."""
    output, _ = process.communicate()
    assert process.returncode == 0, output[-6000:]
    return output


def kill_when(process: preloaded.Started, reached: Callable[[], bool]) -> None:
    """SIGKILL for the run's whole process group at the moment `reached` becomes true."""
    deadline = time.monotonic() + 600
    while not reached():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate(60)[0][-6000:]
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(60)
