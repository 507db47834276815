"""The groups of a step: what is drawn, what was made for it, what is kept. Values made one after the other.

What is trained follows in `megarl.train.selection`.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from megarl.algorithms.base import Group
from megarl.algorithms.plan import Growth, Probe
from megarl.records import Body, Head, Key, Prompt, Trajectory


def draw(prompts: Iterable[Prompt], before: Sequence[Group] = ()) -> tuple[Group, ...]:
    """Groups for `prompts`, with nothing made for them, after those that the step has drawn `before`."""
    drawn = Counter(group.prompt.index for group in before)
    groups: list[Group] = []
    for prompt in prompts:
        groups.append(Group(len(before) + len(groups), prompt, drawn[prompt.index]))
        drawn[prompt.index] += 1
    return tuple(groups)


@dataclass(frozen=True)
class Made:
    """What was made for the groups that a step has drawn.

    On all ranks: `groups` with their heads; `counters`; `generated_tokens` that were made, by kind, and
    `engine_tokens`, those that the engines have counted; `reward_failure`, how the reward failed on an answer, where a
    rank saw that for the first time; `continuations` of trajectories that were there before. On this rank: `bodies` of
    the trajectories that it holds, and `written`, what its engine wrote, as it was written.
    """

    groups: tuple[Group, ...] = ()
    counters: Mapping[str, int] = field(default_factory=dict)
    generated_tokens: Mapping[str, int] = field(default_factory=dict)
    engine_tokens: int = 0
    reward_failure: str | None = None
    bodies: Mapping[Key, Body] = field(default_factory=dict)
    written: tuple[Trajectory, ...] = ()
    continuations: tuple[Head, ...] = ()

    def __add__(self, later: Made) -> Made:
        """What two generation batches of a step have made."""
        return Made(
            self.groups + later.groups,
            added(self.counters, later.counters),
            added(self.generated_tokens, later.generated_tokens),
            self.engine_tokens + later.engine_tokens,
            self.reward_failure or later.reward_failure,
            {**self.bodies, **later.bodies},
            self.written + later.written,
            self.continuations + later.continuations,
        )

    @cached_property
    def answers(self) -> tuple[tuple[Prompt, Head], ...]:
        """All answers with their prompts, but for continuations."""
        return tuple((group.prompt, head) for group in self.groups for head in group.answers if head.parent is None)


@dataclass(frozen=True)
class Kept:
    """The groups to train on, in the order in which they were drawn, and what was counted of the others."""

    groups: tuple[Group, ...] = ()
    counters: Mapping[str, int] = field(default_factory=dict)

    def measured(self, probe: Probe, numbers: Mapping[Key, tuple[float, ...]], counters: Mapping[str, int]) -> Kept:
        """The groups with the numbers that a probe has found of their samples, and what it has counted; without those
        of which it lacks a sample."""
        groups = [
            dataclasses.replace(group, heads=tuple(_with_numbers(head, probe.name, numbers) for head in group.heads))
            for group in self.groups
            if all(head.key in numbers for head in group.of(probe.kind))
        ]
        dropped = len(self.groups) - len(groups)
        lost = {"groups_dropped": dropped, "groups_unmeasured": dropped}
        return Kept(tuple(groups), added(self.counters, counters, lost))


@dataclass(frozen=True)
class Begun:
    """Groups whose prompts were answered, and that are trained when they have grown, or in a later step; `bodies` of
    them on this rank."""

    groups: tuple[Group, ...]
    growths: tuple[Growth, ...]
    bodies: Mapping[Key, Body]

    @property
    def grows(self) -> bool:
        """Whether anything goes on."""
        return any(growth.forks for growth in self.growths)

    def completed(self, made: Made) -> tuple[tuple[Group, ...], dict[Key, Body]]:
        """The groups with their continuations, which `made` has, behind the other heads; and this rank's bodies."""
        by_draw: dict[tuple[int, int], list[Head]] = {}
        for head in made.continuations:
            by_draw.setdefault(head.key[:2], []).append(head)
        groups = tuple(
            dataclasses.replace(group, heads=group.heads + tuple(by_draw.get((group.prompt.index, group.draw), ())))
            for group in self.groups
        )
        bodies = {head.key: made.bodies[head.key] for head in made.continuations if head.key in made.bodies}
        return groups, {**self.bodies, **bodies}


class Rollouts(NamedTuple):
    """What a step has made, what is kept to train on, and the groups of its demonstrations, which every rank holds.
    `bodies` are this rank's of both."""

    made: Made
    kept: Kept
    demonstrations: tuple[Group, ...] = ()
    earlier: Mapping[Key, Body] | None = None
    """This rank's bodies of the kept groups, where an earlier step has begun these."""

    @property
    def bodies(self) -> Mapping[Key, Body]:
        """This rank's bodies of what is kept."""
        return self.made.bodies if self.earlier is None else self.earlier

    def held(self, group: Group, rank: int) -> list[Trajectory]:
        """Those of a group's trajectories that rank `rank`, this one, answers for; the first for what all hold."""
        held = (head for head in group.heads if head.holder == rank or (head.holder is None and rank == 0))
        return [Trajectory(head, self.bodies[head.key]) for head in held]


def added(*counters: Mapping[str, int]) -> dict[str, int]:
    """The sums of counters, by name; without names that nothing was counted for."""
    found: dict[str, int] = {}
    for one in counters:
        for name, amount in one.items():
            if amount:
                found[name] = found.get(name, 0) + amount
    return found


def _with_numbers(head: Head, name: str, numbers: Mapping[Key, tuple[float, ...]]) -> Head:
    found = numbers.get(head.key)
    return head if found is None else dataclasses.replace(head, measured={**head.measured, name: found})
