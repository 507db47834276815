"""Which faults a campaign makes: drawn by its seed, so that every kind and every phase has its share."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

#: `pair`: two ranks that `megarl train` starts here; `four`: four of them; `apart`: two ranks in network namespaces of
#: their own, started one by one with their place in the environment, as torchrun on several hosts does.
World = Literal["pair", "four", "apart"]

PHASES = ("start", "generate", "score", "update", "push", "save", "evaluate")


@dataclass(frozen=True)
class Kind:
    """A kind of fault. `share` of `WHOLE` faults are of it; `wheres` are dealt in turn.

    `does`: what happens, for the report. `good`: what must come of it.
    """

    name: str
    does: str
    good: str
    share: int
    wheres: tuple[tuple[World, str], ...]


def _in(*phases: str, world: World = "pair") -> tuple[tuple[World, str], ...]:
    return tuple((world, phase) for phase in phases)


_NEWEST = _in("newest", "newest", "older")

KINDS = {
    kind.name: kind
    for kind in (
        Kind(
            "kill",
            "SIGKILL of a rank",
            "names rank and phase, code 75",
            28,
            (
                *_in(*PHASES),
                *_in("update", "save", world="apart"),
                *_in("joined", *PHASES),
                *_in("generate", world="four"),
            ),
        ),
        Kind(
            "hang",
            "SIGSTOP of a rank",
            "names rank and phase, code 75",
            20,
            (*_in("joined", *PHASES), *_in("generate", world="apart"), *_in("update", world="four")),
        ),
        Kind("stall", "a rank works on nothing for ever", "names rank and phase, code 75", 11, _in(*PHASES)),
        Kind("term", "SIGTERM to the launcher", "saves, code 75", 5, _in(*PHASES)),
        Kind("usr1", "SIGUSR1 to the launcher", "saves, code 75", 5, _in(*PHASES)),
        Kind("group", "SIGKILL of all processes", "nobody is left to say so", 5, _in("save", *PHASES[:4])),
        Kind("launcher", "SIGKILL of the launcher", "the ranks end with it", 3, _in("generate", "save", "update")),
        Kind("disk-full", "the disk is full all at once", "one sentence, code 2", 5, _in("save", "save", "generate")),
        Kind("disk-short", "the disk is too full for the next save", "one sentence, code 2", 3, _in("update")),
        Kind("flip", "one bit of a checkpoint differs", "the one before it", 5, _NEWEST),
        Kind("truncate", "a file of a checkpoint is cut off", "the one before it", 3, _NEWEST),
        Kind("lost-file", "a file of a checkpoint is gone", "the one before it", 3, _NEWEST),
        Kind("torn-note", "progress.json ends in the middle", "the one before it", 3, _NEWEST),
        Kind("all-damaged", "no checkpoint is whole", "one sentence, code 2", 2, _in("all")),
        Kind("no-latest", "`latest` is gone", "goes on from the newest", 2, _in("latest")),
        Kind("network", "the network between two hosts is cut", "names the host cut off, code 75", 7,
             _in("generate", "update", "save", "push", "score", "evaluate", "start", world="apart")),
        Kind("reward", "a grading process dies", "goes on, the same to the bit", 5, _in("score", "generate", "start")),
    )
}  # fmt: skip

#: Faults of a campaign in which every kind has its share.
WHOLE = sum(kind.share for kind in KINDS.values())

#: Kinds that damage what is on the disk while no run is under way.
AT_REST = ("flip", "truncate", "lost-file", "torn-note", "all-damaged", "no-latest")


@dataclass(frozen=True)
class Fault:
    """One fault. `entry` and `delay` are shares: of the phase's entries, of its length. `draw` decides the rest."""

    number: int
    kind: str
    world: World
    phase: str
    rank: int
    entry: float
    delay: float
    draw: int

    @property
    def name(self) -> str:
        return f"{self.number:03d}-{self.kind}-{self.phase}" + ("" if self.world == "pair" else f"-{self.world}")


def ranks_of(world: World) -> int:
    return 4 if world == "four" else 2


def plan(seed: int, number: int, kinds: Sequence[str]) -> list[Fault]:
    """The first `number` faults of a seed. One of each kind comes first, then all by their shares."""
    chosen = [KINDS[name] for name in kinds]
    turns = -(-number // sum(kind.share for kind in chosen))
    order = _order(chosen, turns)
    dealt = {kind.name: _Dealer(seed, kind) for kind in chosen}
    faults = []
    for position, kind in enumerate(order[:number]):
        world, phase = dealt[kind.name].deal()
        # Of its own for each fault: a campaign of other kinds keeps what they share.
        draw = random.Random(f"{seed} {kind.name} {dealt[kind.name].count}")
        faults.append(
            Fault(
                number=position + 1,
                kind=kind.name,
                world=world,
                phase=phase,
                # Of two hosts that are cut off from each other, the other one than the store's is named.
                rank=1 if kind.name == "network" else draw.randrange(ranks_of(world)),
                entry=draw.random(),
                delay=draw.random(),
                draw=draw.randrange(1 << 30),
            )
        )
    return faults


def _order(chosen: Sequence[Kind], turns: int) -> list[Kind]:
    places = [
        (turn + nth / kind.share, place)
        for turn in range(turns)
        for place, kind in enumerate(chosen)
        for nth in range(kind.share)
    ]
    return [chosen[place] for _, place in sorted(places)]


class _Dealer:
    """Deals a kind's places: each once in an order that the seed decides, then each again."""

    def __init__(self, seed: int, kind: Kind) -> None:
        self._random, self._kind, self.count = random.Random(f"{seed} {kind.name}"), kind, 0
        self._left: list[tuple[World, str]] = []

    def deal(self) -> tuple[World, str]:
        if not self._left:
            self._left = list(self._kind.wheres)
            self._random.shuffle(self._left)
        self.count += 1
        return self._left.pop()
