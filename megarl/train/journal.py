"""Completions that nothing else has yet: kept as they are made, so that a process that is killed does not make them
again. Those of a training step wait for its checkpoint, those of an evaluation for their grades.

`runs/<name>/unfinished/step_000012.rank_0003.bin` holds what that rank's engine made: a line of JSON that says what
for, then record after record: a line of JSON with key, length and how it ended; token ids as int32; log-probs as
float32.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from megarl.config.schema import RunConfig
from megarl.parallel.exchange import gather_all
from megarl.records import FinishReason, Key
from megarl.rollout.engine import Completion

#: Sections whose settings change no number of a rollout by more than rounding.
_ELSEWHERE = ("name", "runs_dir", "resume", "resume_changes", "parallel", "recompute")
_ELSEWHERE += ("evaluation", "checkpoint", "logging", "weights", "health")


class Journal:
    """Completions under a `name` in `directory`, as one of the ranks writes and reads them. Collective to make.

    What was made for something else than `made_for` is not read. `writes`: this rank's completions count.
    """

    def __init__(self, directory: Path, name: str, made_for: str, *, rank: int, writes: bool) -> None:
        self._file = directory / f"{name}.rank_{rank:04d}.bin"
        self._writes, self._identity = writes, made_for
        self._handle: BinaryIO | None = None
        self._found: dict[Key, Completion] = {}
        for file in sorted(directory.glob(f"{name}.rank_*.bin")):
            self._found |= dict(_read(file, self._identity))
        # The same on all ranks, so that all leave the same out of their engines' work.
        seen = gather_all(frozenset(self._found))
        self._known = frozenset.intersection(*seen)

    def __len__(self) -> int:
        """How many completions were made before."""
        return len(self._known)

    def knows(self, key: Key) -> bool:
        """Whether the completion was made before; the same on all ranks."""
        return key in self._known

    def take(self, key: Key, index: int) -> Completion:
        """A completion that was made before, as that of request `index`."""
        found = self._found[key]
        return dataclasses.replace(found, index=index)

    def add(self, key: Key, completion: Completion) -> None:
        """Keep a completion: with the next line of code it survives the end of this process."""
        if not self._writes or key in self._known:
            return
        if self._handle is None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            # A record that was torn in two ends the reading: what this process adds goes into a file of its own.
            number, file = 0, self._file
            while file.exists():
                number += 1
                file = self._file.with_suffix(f".{number}.bin")
            self._handle = open(file, "wb", buffering=0)  # noqa: SIM115 (until `close`)
            self._handle.write(json.dumps({"made_for": self._identity}).encode() + b"\n")
        head = (
            json.dumps([key, len(completion.token_ids), completion.finish_reason, completion.version]).encode() + b"\n"
        )
        tokens, log_probs = np.array(completion.token_ids, np.int32), np.array(completion.log_probs, np.float32)
        self._handle.write(head + tokens.tobytes() + log_probs.tobytes())

    def close(self) -> None:
        """Write no more."""
        if self._handle is not None:
            self._handle.close()
            self._handle = None


def step_journal(directory: Path, step: int, config: RunConfig, *, rank: int, writes: bool) -> Journal:
    """The journal of a step, which reads nothing that was made for other settings, or by later steps' weights."""
    return Journal(directory, _step_name(step), _identity(config), rank=rank, writes=writes)


class Entries(NamedTuple):
    """The journal of a call to the engine, and the keys of its requests by their index."""

    journal: Journal
    keys: Mapping[int, Key]


def forget(directory: Path, step: int) -> None:
    """Remove what is kept of the steps up to `step`, which a checkpoint has."""
    for file in directory.glob("step_*.bin"):
        if int(file.name[len("step_") :].partition(".")[0]) <= step:
            file.unlink(missing_ok=True)


def discard(directory: Path, step: int) -> None:
    """Remove what is kept of one step, which is not to be used."""
    remove(directory, _step_name(step))


def remove(directory: Path, name: str) -> None:
    """Remove what is kept under a name."""
    for file in directory.glob(f"{name}.rank_*.bin"):
        file.unlink(missing_ok=True)


def _step_name(step: int) -> str:
    return f"step_{step:06d}"


def _identity(config: RunConfig) -> str:
    table = {name: value for name, value in config.model_dump(mode="json").items() if name not in _ELSEWHERE}
    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()


def _read(file: Path, identity: str) -> Iterator[tuple[Key, Completion]]:
    """The records of a file, up to one that was not finished; none of a file that was made for something else."""
    with open(file, "rb") as handle:
        try:
            if json.loads(handle.readline()) != {"made_for": identity}:
                return
            while head := handle.readline():
                (prompt, draw, number, kind, branch), length, ended, version = json.loads(head)
                content = handle.read(8 * length)
                if len(content) < 8 * length:
                    return
                tokens = np.frombuffer(content, np.int32, length)
                log_probs = np.frombuffer(content, np.float32, length, 4 * length)
                reason: FinishReason = ended
                key = Key(prompt, draw, number, kind, tuple(branch))
                ids, numbers = tuple(tokens.tolist()), tuple(log_probs.tolist())
                yield key, Completion(-1, ids, numbers, reason, version=version)
        except ValueError:
            return
