"""What must be set in a process before vLLM is imported, and how its noise is kept away."""

from __future__ import annotations

import logging
import os
import random
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from megarl.errors import Refusal
from megarl.parallel import terminal

#: Read by vLLM when its modules are imported; a user's own setting wins.
_DEFAULTS = {
    # Warnings of a working engine (deprecations, absent accelerators) would bury the run's own lines.
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}


def prepare() -> None:
    """Set vLLM's environment variables, before anything imports vLLM. Idempotent."""
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    # The external launcher runs the engine's core in this process, and vLLM asserts this variable.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    level = os.environ["VLLM_LOGGING_LEVEL"].upper()
    if level not in logging.getLevelNamesMapping():
        rule = f"must be one of {', '.join(logging.getLevelNamesMapping())}"
        raise Refusal(f"VLLM_LOGGING_LEVEL={level} in the environment", rule, "unset or correct it")
    logging.getLogger("vllm").setLevel(level)


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back what libraries print, and Python warnings, while the block runs; show it where the block fails."""
    with warnings.catch_warnings(), tempfile.TemporaryFile() as held:
        warnings.simplefilter("ignore")
        streams = {1: sys.stdout, 2: sys.stderr}
        for stream in streams.values():
            stream.flush()
        # C++ libraries write to the descriptors, not to sys.stdout and sys.stderr.
        kept = {descriptor: os.dup(descriptor) for descriptor in streams}
        failed = True
        try:
            # The run may end meanwhile, and has to say why.
            with terminal.kept_at(kept[2]):
                try:
                    for descriptor in streams:
                        os.dup2(held.fileno(), descriptor)
                    yield
                    failed = False
                finally:
                    for descriptor, stream in streams.items():
                        stream.flush()
                        os.dup2(kept[descriptor], descriptor)
        finally:
            for descriptor in kept.values():
                os.close(descriptor)
            if failed:
                held.seek(0)
                sys.stderr.write(held.read().decode(errors="replace"))


@contextmanager
def own_randomness(seed: int | None) -> Iterator[None]:
    """Give the block random states of its own and put the trainer's back afterwards.

    vLLM seeds and draws from the process's global generators (Python, NumPy, torch), which belong to
    the trainer. With a `seed` they start from it inside the block: ranks of one replica that sample
    without per-request seeds must draw the same numbers, and nothing else keeps them equal.
    """
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=devices):
        try:
            if seed is not None:
                random.seed(seed)
                np.random.seed(seed % 2**32)
                torch.manual_seed(seed)
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def preload() -> None:
    """Import vLLM quietly, with its environment set; a parent that forks workers does this once for all."""
    prepare()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import vllm.v1.engine.llm_engine  # noqa: F401
