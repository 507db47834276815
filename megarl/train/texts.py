"""Texts to learn: made of what was generated, kept for prompts that return, or taken from the data set."""

from __future__ import annotations

from collections.abc import Sequence

from megarl.algorithms.base import Group
from megarl.algorithms.plan import Plan, Text
from megarl.data.tokenizer import Tokenizer, response_ids
from megarl.records import SOLUTION, Body, Head, Key, Stretch, Trajectory
from megarl.train.generation import Job
from megarl.train.groups import added
from megarl.train.text_cache import TextCache


def learned(jobs: Sequence[Job], samples: dict[int, Trajectory], rank: int) -> tuple[list[Trajectory], dict[str, int]]:
    """What this rank's `samples`, by position in `jobs`, are learned as, and what is counted of them: the samples
    themselves, or the texts that are made of them."""
    found: list[Trajectory] = []
    counters: dict[str, int] = {}
    for position, sample in samples.items():
        job = jobs[position]
        if job.generation.learn is None:
            found.append(sample)
            continue
        made = job.generation.learn(job.group.prompt, sample)
        counters = added(counters, made.counters)
        if made.text is not None:
            found.append(trajectory_of(made.text, job.key, rank))
    return found, counters


def trajectory_of(text: Text, key: Key, holder: int | None) -> Trajectory:
    """A text to learn as a trajectory."""
    head = Head(key, holder, (Stretch(0, len(text.token_ids), "text"),), marks=text.marks)
    return Trajectory(head, Body(text.token_ids))


def of_solutions(groups: Sequence[Group], tokenizer: Tokenizer, limit: int) -> tuple[list[Trajectory], dict[str, int]]:
    """The prompts' worked solutions, which every rank holds; of the kind "solution".

    One longer than `limit` tokens is cut there and counted as `solutions_cut`.
    """
    found: list[Trajectory] = []
    cut = 0
    for group in groups:
        assert group.prompt.solution is not None
        ids = response_ids(tokenizer, group.prompt.solution)
        cut += len(ids) > limit
        key = Key(group.prompt.index, group.draw, 0, SOLUTION)
        found.append(trajectory_of(Text(tuple(ids[:limit])), key, None))
    return found, {"solutions_cut": cut}


def cached(texts: TextCache, plan: Plan, step: int, groups: Sequence[Group]) -> tuple[list[Trajectory], dict[str, int]]:
    """Texts of earlier steps for the groups, which every rank holds; then forget what is too old for any later step."""
    found: list[Trajectory] = []
    counters: dict[str, int] = {}
    for generation in plan.generations:
        if generation.refresh_every == 1:
            continue
        for group in groups:
            again = texts.of(generation, group.prompt.index, step) or {}
            keys = {number: Key(group.prompt.index, group.draw, number, generation.kind) for number in again}
            found += [trajectory_of(text, keys[number], None) for number, text in again.items()]
            counters = added(counters, {f"{generation.kind}s_reused": len(again)})
        texts.forget(generation, step)
    return found, counters
