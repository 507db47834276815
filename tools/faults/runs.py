"""The campaign's run: small, of every phase, with a watch that is quick; and what it is like where nothing fails."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults import deeds, process
from faults.places import Hosts
from faults.plan import World
from faults.process import Started

TOOLS = Path(__file__).resolve().parent.parent

STEPS = 4

#: Where ranks apart meet; their network is their own.
PORT = "29500"

#: Checkpoints that are kept.
KEEP = 2

#: Seconds, in the settings of the run.
SILENCE, JOIN_LIMIT, NOTICE = 8.0, 20.0, 15.0
LIMITS = {"start": 60.0, "save": 25.0} | dict.fromkeys(("generate", "score", "update", "push", "evaluate"), 10.0)

RUN: dict[str, Any] = {
    "name": "run",
    "steps": STEPS,
    "seed": 3,
    "precision": "fp32",
    "resume": "auto",
    "model": {"path": "model"},
    "algorithm": {"name": "grpo"},
    "data": {
        "path": "data/train.jsonl",
        "answer_column": "answer",
        "solution_column": "solution",
        "max_prompt_tokens": 32,
    },
    "rollout": {"group_size": 4, "max_tokens": 16, "kv_cache_gib": 0.02},
    "reward": {"kind": "faults.rewards:digit_share", "time_limit": 60.0, "workers": 1},
    "batch": {"prompts": 6, "tokens_per_microbatch": 192},
    "optimizer": {"lr": 1e-3, "warmup_steps": 2, "decay": "linear"},
    "logging": {"tensorboard": False, "samples": 8},
    "checkpoint": {"every": 1, "keep": KEEP, "export_hf": True},
    "evaluation": {"path": "data/heldout.jsonl", "every": 2, "end": True},
    "health": {
        "interval": 0.25,
        "silence": SILENCE,
        "join_limit": JOIN_LIMIT,
        "first_limit": 20.0,
        "limits": LIMITS,
        "notice": NOTICE,
        "term_notice": NOTICE,
        "preflight": {"limit": 20.0},
    },
}

PARALLEL = {
    "pair": ["parallel.processes=2", "parallel.tensor=2"],
    "four": ["parallel.processes=4", "parallel.tensor=2"],
    # Two that do not know of each other's host.
    "apart": ["parallel.processes=2", "parallel.tensor=2"],
}


class RunFailed(Exception):
    """A run without a fault did not end well."""


def write_inputs(folder: Path) -> None:
    """Data, tokenizer, model and run.yaml, where they are not there."""
    import yaml

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.yaml").write_text(yaml.safe_dump(RUN), encoding="utf-8")
    if (folder / "complete").is_file():
        return
    for tool in (
        "make_arithmetic --out data --train 48 --heldout 8",
        "train_tokenizer --input data/train.jsonl --vocab-size 300 --out tokenizer",
        "make_tiny_model --out model --tokenizer tokenizer --tied --hidden 64 --layers 2 --heads 2 --kv-heads 1",
    ):
        name, *arguments = tool.split()
        command = [sys.executable, str(TOOLS / f"{name}.py"), *arguments]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
    (folder / "complete").touch()


def start(
    folder: Path,
    world: World,
    name: str,
    log: Path,
    *settings: str,
    hosts: Hosts | None = None,
    prepare: Callable[[], None] = lambda: None,
) -> list[Started]:
    """Start a run named `name`: one process, or one per rank where the ranks are apart."""
    arguments = ["train", "run.yaml", f"name={name}", *PARALLEL[world], *settings]
    if world != "apart":
        return [process.start(arguments, folder, log, prepare=prepare)]
    assert hosts is not None

    def start_on(host: int) -> Started:
        def enter() -> None:
            hosts.enter(host)
            prepare()

        return process.start(
            arguments,
            folder,
            log.with_suffix(f".{host}.log"),
            environment={
                "RANK": str(host),
                "WORLD_SIZE": "2",
                "LOCAL_RANK": "0",
                "LOCAL_WORLD_SIZE": "1",
                "MASTER_ADDR": hosts.addresses[0],
                "MASTER_PORT": PORT,
                "GLOO_SOCKET_IFNAME": "eth0",
            },
            prepare=enter,
        )

    return [start_on(host) for host in range(2)]


# --- what is compared with -------------------------------------------------------------------------------------------


class Reference:
    """A run that nothing happened to: its weights, and how often and how long its ranks are in which phase."""

    def __init__(self, folder: Path, world: World) -> None:
        self.folder: Path = folder
        self.world: World = world
        self.run = folder / "runs" / f"reference-{world}"
        self._traces = folder / f"trace-{world}"

    def make(self, hosts: Hosts | None) -> None:
        """Run it, where it has not been."""
        if (self._traces / "complete").is_file():
            return
        for old in (self.run, self._traces):
            shutil.rmtree(old, ignore_errors=True)
        self._traces.mkdir()
        log = self.folder / f"reference-{self.world}.log"
        traced = start(
            self.folder, self.world, self.run.name, log, hosts=hosts, prepare=lambda: deeds.trace(self._traces)
        )
        expect_end(traced)
        (self._traces / "complete").touch()

    def entries(self, rank: int, phase: str) -> list[float]:
        """How long each time was in seconds that a rank was in a phase."""
        if phase == deeds.JOINED:
            return [0.0]
        lines = (self._traces / f"rank_{rank}.jsonl").read_text(encoding="utf-8").splitlines()
        times = [json.loads(line) for line in lines]
        return [after[1] - one[1] for one, after in itertools.pairwise(times) if one[0] == phase]

    def differs(self, run: Path) -> str | None:
        """What of a run's final weights is not the same to the bit, in words."""
        from safetensors.numpy import load_file

        for file in sorted((self.run / "hf").glob("*.safetensors")):
            if not (run / "hf" / file.name).is_file():
                return f"no hf/{file.name}"
            expected, found = load_file(file), load_file(run / "hf" / file.name)
            if set(expected) != set(found):
                return "other tensors"
            for name, values in expected.items():
                if values.dtype != found[name].dtype or values.tobytes() != found[name].tobytes():
                    return f"other weights in {name}"
        return None


class Halfway:
    """A run that was killed with two finished checkpoints, and steps to go."""

    def __init__(self, reference: Reference) -> None:
        self._reference = reference
        self.run = reference.folder / "runs" / "halfway"

    def make(self) -> None:
        if (self.run / "complete").is_file():
            return
        shutil.rmtree(self.run, ignore_errors=True)
        folder, note = self._reference.folder, self._reference.folder / "halfway.json"
        moment = deeds.Moment("update", 0, STEPS, 0.0)
        trigger = deeds.Trigger(moment, deeds.kill_group, note, self.run / "checkpoints", main=False)
        process.wait(
            start(folder, "pair", self.run.name, folder / "halfway.log", prepare=trigger.install), lambda: False
        )
        if len(deeds.finished(self.run / "checkpoints")) != KEEP:
            raise RunFailed(f"the run to damage did not come halfway: see {folder}/halfway.log")
        (self.run / "complete").touch()


def expect_end(runs: list[Started]) -> None:
    """Wait for a run that must succeed."""
    process.wait(runs, lambda: False)
    for one in runs:
        if one.code != 0:
            raise RunFailed(f"a run without a fault ended with code {one.code}: see {one.log}")


def python_path() -> str:
    """For the grading processes, which import the reward of the campaign."""
    return os.pathsep.join([str(TOOLS.parent), str(TOOLS)])
