"""Groups that wait for the next step, in a checkpoint: what all ranks know of them, and the tokens by who holds them.

`waiting.json` has the groups with their heads, `waiting.replica_0003.npz` the bodies that the engine replica of that
number held. Read by other ranks than wrote it, a replica's bodies go to the one of its number modulo theirs.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megarl.algorithms.base import Group
from megarl.algorithms.plan import Fork, Growth
from megarl.records import Body, Head, Key, Prompt, Stretch
from megarl.train.groups import Begun

_HEADS = "waiting.json"
#: What a body has of each token, with the type that is saved.
_VALUES = {"token_ids": np.int32, "log_probs": np.float32, "old_log_probs": np.float32}


class Place(NamedTuple):
    """Where this rank stands among the engine replicas, of `tensor` ranks each."""

    rank: int
    replicas: int
    tensor: int

    @classmethod
    def of(cls, rank: int, size: int, tensor: int) -> Place:
        """The place of a rank of `size`."""
        return cls(rank, max(size // tensor, 1), tensor)

    @property
    def replica(self) -> int | None:
        """The replica whose bodies this rank holds; None where another rank does."""
        return None if self.rank % self.tensor else self.rank // self.tensor


def write(begun: Begun, folder: Path, place: Place) -> None:
    """Write what this rank has of `begun`: the first all heads, every holder its bodies."""
    if place.rank == 0:
        groups = [
            [group.number, group.prompt.index, group.draw, [_plain(head, place) for head in group.heads]]
            for group in begun.groups
        ]
        growths = [[growth.forks, growth.left_out] for growth in begun.growths]
        (folder / _HEADS).write_text(json.dumps({"groups": groups, "growths": growths}), encoding="utf-8")
    if place.replica is not None:
        bodies = list(begun.bodies.items())
        arrays: dict[str, Any] = {
            name: np.concatenate([np.empty(0, kind), *(np.array(getattr(body, name), kind) for _, body in bodies)])
            for name, kind in _VALUES.items()
        }
        rest = [
            [key, [len(getattr(body, name)) for name in _VALUES], body.seed, body.text, body.prompt_ids, body.texts]
            for key, body in bodies
        ]
        np.savez(_bodies(folder, place.replica), rest=np.frombuffer(json.dumps(rest).encode(), np.uint8), **arrays)


def read(folder: Path, place: Place, prompts: Mapping[int, Prompt]) -> Begun | None:
    """What waited when the checkpoint `folder` was saved, with the bodies that are this rank's now; None: nothing."""
    if not (folder / _HEADS).exists():
        return None
    saved = json.loads((folder / _HEADS).read_text(encoding="utf-8"))
    groups = tuple(
        Group(number, prompts[index], draw, tuple(_head(one, place) for one in heads))
        for number, index, draw, heads in saved["groups"]
    )
    growths = tuple(
        Growth(tuple(Fork(_key(parent), at, count) for parent, at, count in forks), left_out)
        for forks, left_out in saved["growths"]
    )
    bodies: dict[Key, Body] = {}
    replicas = {head["holder"] for _, _, _, heads in saved["groups"] for head in heads}
    for replica in sorted(one for one in replicas if one is not None):
        if replica % place.replicas == place.replica:
            bodies |= _read_bodies(_bodies(folder, replica))
    return Begun(groups, growths, bodies)


def _bodies(folder: Path, replica: int) -> Path:
    return folder / f"waiting.replica_{replica:04d}.npz"


def _read_bodies(file: Path) -> dict[Key, Body]:
    bodies: dict[Key, Body] = {}
    with np.load(file) as arrays:
        values, starts = {name: arrays[name] for name in _VALUES}, dict.fromkeys(_VALUES, 0)
        for key, sizes, seed, text, prompt_ids, texts in json.loads(arrays["rest"].tobytes()):
            own: dict[str, Any] = {}
            for name, size in zip(_VALUES, sizes, strict=True):
                own[name] = tuple(values[name][starts[name] : starts[name] + size].tolist())
                starts[name] += size
            ids = None if prompt_ids is None else tuple(prompt_ids)
            bodies[_key(key)] = Body(**own, text=text, seed=seed, prompt_ids=ids, texts=tuple(texts))
    return bodies


def _plain(head: Head, place: Place) -> dict[str, Any]:
    """A head in JSON's types, its holder being the number of a replica."""
    holder = None if head.holder is None else head.holder // place.tensor
    return dataclasses.asdict(dataclasses.replace(head, holder=None)) | {"holder": holder}


def _head(saved: dict[str, Any], place: Place) -> Head:
    replica = saved["holder"]
    return Head(
        **saved
        | {
            "key": _key(saved["key"]),
            "holder": None if replica is None else replica % place.replicas * place.tensor,
            "stretches": tuple(Stretch(*one) for one in saved["stretches"]),
            "measured": {name: tuple(numbers) for name, numbers in saved["measured"].items()},
        }
    )


def _key(saved: list[Any]) -> Key:
    return Key(*saved)._replace(branch=tuple(saved[-1]))
