"""Continuations: what is asked of the engine beside new samples, after a part of what an earlier call has written."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from megarl.algorithms.plan import Plan
from megarl.config.schema import RunConfig
from megarl.records import Body, Head, Key, Stretch
from megarl.rollout.draw import OwnFirst
from megarl.rollout.engine import Completion, Request
from megarl.rollout.seeds import hash_seed
from megarl.train import generation
from megarl.train.generation import Job, stretches_of
from megarl.train.groups import Begun
from megarl.train.journal import Entries, Journal
from megarl.train.outputs import Output
from megarl.train.session import Session


def jobs(config: RunConfig, plan: Plan, step: int, begun: Begun, start: int) -> list[Job]:
    """The continuations that the groups that were begun want, as jobs from position `start` on."""
    by_kind = {one.kind: one for one in plan.generations}
    made: list[Job] = []
    for group, growth in zip(begun.groups, begun.growths, strict=True):
        written: Counter[Key] = Counter()
        for fork in growth.forks:
            asked = by_kind[fork.parent.kind]
            for _ in range(fork.count):
                key = fork.parent._replace(branch=(*fork.parent.branch, written[fork.parent]))
                written[fork.parent] += 1
                seed = None
                if generation.is_seeded(config, asked.weights):
                    place = (key.prompt, key.draw, key.number, *key.branch)
                    seed = hash_seed(f"{key.kind} goes on", config.seed, step, *place)
                most = (asked.max_tokens or config.rollout.max_tokens) - fork.place
                request = Request(group.prompt.token_ids, start + len(made), seed, most)
                made.append(Job(key, group, asked, request, fork))
    return made


def outputs(
    session: Session,
    step: int,
    batch: int,
    asked: Sequence[Job],
    journal: Journal | None,
    bodies: Mapping[Key, Body],
) -> list[Output]:
    """New samples and continuations of the samples that this replica holds, in one call of the engine.

    A replica goes on with its own samples: no prefix travels to another, and the engine computes one that several
    continuations share once, as far as it finds it in its cache.
    """
    engine, weights = session.inference.running_engine, asked[0].generation.weights
    first = engine.replica * session.config.rollout.tensor
    own = [job for job in asked if job.fork is not None and _holder(job) == first]
    prefixes = {job.request.index: _prefix(job, bodies) for job in own} if engine.speaks else {}
    kept: dict[int, tuple[int, ...]] = engine.told({index: one.token_ids for index, one in prefixes.items()})
    new = [job for job in asked if job.fork is None]
    keys = {job.request.index: job.key for job in new}
    keys |= {job.request.index: _journal_key(job, kept[job.request.index]) for job in own}
    entries = None if journal is None else Entries(journal, keys)
    requests = [
        replace(job.request, prompt_token_ids=(*job.request.prompt_token_ids, *kept[job.request.index])) for job in own
    ]
    session.inference.use(weights)
    left, known = generation.split([job.request for job in new], entries)
    left_own, known_own = generation.split(requests, entries)
    work = OwnFirst(range(len(left), len(left) + len(left_own)), session.inference.work(len(left)))
    sampling = generation.sampling_of(session.config, step, batch, weights)
    made = engine.generate([*left, *left_own], sampling, work, generation.added_to(entries))
    known = [*known[engine.replica :: engine.num_replicas], *known_own]
    return [_after(prefixes.get(one.index), one, weights) for one in generation.together(made, known, entries)]


class Prefix(NamedTuple):
    """What a continuation keeps of the trajectory that it goes on from."""

    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    stretches: tuple[Stretch, ...]
    old_log_probs: tuple[float, ...]


def _holder(job: Job) -> int | None:
    assert job.fork is not None
    return head_of(job).holder


def head_of(job: Job) -> Head:
    """The head of the trajectory that a continuation goes on from."""
    return next(head for head in job.group.heads if job.fork is not None and head.key == job.fork.parent)


def _prefix(job: Job, bodies: Mapping[Key, Body]) -> Prefix:
    assert job.fork is not None
    place, head, body = job.fork.place, head_of(job), bodies[job.fork.parent]
    stretches = tuple(one._replace(end=min(one.end, place)) for one in head.stretches if one.start < place)
    return Prefix(body.token_ids[:place], body.log_probs[:place], stretches, body.old_log_probs[:place])


def _journal_key(job: Job, prefix: tuple[int, ...]) -> Key:
    """A name that another prefix would not have: a step that is made again may have grown its trees otherwise."""
    digest = hashlib.blake2b(np.array(prefix, np.int32).tobytes(), digest_size=8).hexdigest()
    return job.key._replace(kind=f"{job.key.kind} after {digest}")


def _after(prefix: Prefix | None, written: Completion, weights: str) -> Output:
    """What was written, after what is kept of an earlier trajectory."""
    if prefix is None:
        return Output(written, stretches=stretches_of((written, weights)))
    kept = len(prefix.token_ids)
    own = (one._replace(start=one.start + kept, end=one.end + kept) for one in stretches_of((written, weights)))
    whole = replace(
        written, token_ids=prefix.token_ids + written.token_ids, log_probs=prefix.log_probs + written.log_probs
    )
    return Output(whole, stretches=(*prefix.stretches, *own), kept=kept, old_log_probs=prefix.old_log_probs)
