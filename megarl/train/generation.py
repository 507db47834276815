"""From drawn groups to generated tokens: what is asked of the engine, with which seeds, in one part or in two."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from megarl.algorithms import declared
from megarl.algorithms.base import Group
from megarl.algorithms.plan import Fork, Generation, Plan, Responder
from megarl.config.implied import Implied
from megarl.config.parameter_sets import POLICY
from megarl.config.schema import RunConfig
from megarl.policy.determinism import repeats
from megarl.records import Key, Stretch
from megarl.rollout.engine import Completion, Request, Sampling
from megarl.rollout.play import Task
from megarl.rollout.seeds import batch_seed, hash_seed, sample_seed
from megarl.train.groups import added
from megarl.train.inference import Inference
from megarl.train.journal import Entries, Journal
from megarl.train.outputs import Output
from megarl.train.played import is_played, play_outputs
from megarl.train.session import Session


@dataclass(frozen=True, slots=True)
class Job:
    """One sample to generate for group `group` of the step.

    `request.index` is the job's position in the list of jobs that are made together. `fork`: where it goes on from what
    is there, how; then the request's prompt is the group's alone until the holder's replica makes it.
    """

    key: Key
    group: Group
    generation: Generation
    request: Request
    fork: Fork | None = None


def jobs(
    config: RunConfig, plan: Plan, step: int, groups: Iterable[Group], is_cached: Callable[[Generation, Group], bool]
) -> tuple[list[Job], dict[str, int]]:
    """What is to be generated for `groups`, kind by kind, and what is counted of what is not.

    Nothing for a prompt whose texts of an earlier step are used again. Raises `TrainingStopped` for a prompt of the
    algorithm's own that there is no room for.
    """
    made: list[Job] = []
    counters: dict[str, int] = {}
    for generation in plan.generations:
        for group in groups:
            if is_cached(generation, group):
                continue
            ids = group.prompt.token_ids if generation.prompt is None else generation.prompt(group.prompt)
            if isinstance(ids, str):
                counters = added(counters, {ids: 1})
                continue
            if generation.prompt is not None:
                declared.stop_at(declared.of_prompt(generation, ids, config))
            for number in range(generation.count):
                key = Key(group.prompt.index, group.draw, number, generation.kind)
                seed = _seed(config, step, key, generation) if is_seeded(config, generation.weights) else None
                request = Request(tuple(ids), len(made), seed, generation.max_tokens)
                made.append(Job(key, group, generation, request))
    return made, counters


def outputs(session: Session, step: int, batch: int, asked: Sequence[Job], journal: Journal | None) -> list[Output]:
    """What this rank's replica makes of the jobs. Those for the same writers go to the engine in one call; those
    that an environment answers are played. Collective: the engine may change its weights. Raises as `play_outputs`."""
    found: list[Output] = []
    for played, some in groupby(asked, key=lambda job: is_played(session, job.generation)):
        if played:
            found += _played(session, step, batch, list(some))
            continue
        for writers, some_of in groupby(some, key=lambda job: (job.generation.weights, job.generation.responder)):
            found += _outputs(session, step, batch, list(some_of), *writers, journal)
    return found


def _played(session: Session, step: int, batch: int, asked: Sequence[Job]) -> list[Output]:
    """Samples of several turns. They are not kept in the journal."""
    generation = asked[0].generation
    sampling = sampling_of(session.config, step, batch, generation.weights)
    sampling = replace(sampling, max_tokens=generation.max_tokens or sampling.max_tokens)
    tasks = tasks_of(session.config, step, asked)
    session.inference.use(generation.weights)
    return play_outputs(
        session, tasks, sampling, session.grading, session.inference.work(len(tasks)), generation.weights
    )


def tasks_of(config: RunConfig, step: int, asked: Sequence[Job]) -> list[Task]:
    """The samples of several turns that are asked for. Their environments have seeds also where the engine's requests
    have none."""
    return [
        Task(
            index=job.request.index,
            prompt=replace(job.group.prompt, token_ids=job.request.prompt_token_ids),
            environment_seed=hash_seed("environment", _seed(config, step, job.key, job.generation)),
            seed=job.request.seed,
        )
        for job in asked
    ]


def _outputs(
    session: Session,
    step: int,
    batch: int,
    asked: Sequence[Job],
    weights: str,
    responder: Responder | None,
    journal: Journal | None,
) -> list[Output]:
    requests, sampling = [job.request for job in asked], sampling_of(session.config, step, batch, weights)

    def entries(part: str = "") -> Entries | None:
        """The jobs, or a part of them, in the journal."""
        keys = {job.request.index: job.key._replace(kind=job.key.kind + part) for job in asked}
        return None if journal is None else Entries(journal, keys)

    session.inference.use(weights)
    if responder is None:
        made = generate(session.inference, requests, sampling, entries())
        return [Output(one, stretches=stretches_of((one, weights))) for one in made]
    inference, end = session.inference, session.thinking_end.require_token()
    thinkings = think(inference, end, requests, sampling, entries(" thinking"))
    return respond(inference, end, Thinkings(thinkings, requests, weights), sampling, responder, entries(" response"))


@dataclass(frozen=True, slots=True)
class Thinkings:
    """The thinkings that this replica made for `requests`, written by the parameter set `weights`."""

    completions: Sequence[Completion]
    requests: Sequence[Request]
    weights: str = POLICY


def stretches_of(*parts: tuple[Completion, str]) -> tuple[Stretch, ...]:
    """Consecutive parts of a response, each with the parameter set that wrote it."""
    found: list[Stretch] = []
    for part, weights in parts:
        start = found[-1].end if found else 0
        end = start + len(part.token_ids)
        own = weights == POLICY
        found += [Stretch(start, end, "policy" if own else "other", part.version if own else None)] * (end > start)
    return tuple(found)


def sampling_of(config: RunConfig, step: int, batch: int, weights: str = POLICY) -> Sampling:
    """How generation batch `batch` of a step samples from a parameter set."""
    settings = config.rollout
    return Sampling(
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        stop_token_ids=settings.stop_token_ids,
        seed=batch_seed(config.seed, _occasion(config, step, weights), batch),
    )


def generate(
    inference: Inference,
    requests: Sequence[Request],
    sampling: Sampling,
    entries: Entries | None = None,
    on_made: Callable[[Completion], None] | None = None,
) -> list[Completion]:
    """This replica's completions. The same on all its ranks.

    With `entries`, those that were made before are not made again: the replicas take them in turns. `on_made` is told
    each that is made now.
    """
    engine = inference.running_engine
    left, known = split(requests, entries)
    made = engine.generate(left, sampling, inference.work(len(left)), _each(added_to(entries), on_made))
    return together(made, known[engine.replica :: engine.num_replicas], entries)


def think(
    inference: Inference,
    end: int,
    requests: Sequence[Request],
    sampling: Sampling,
    entries: Entries | None = None,
) -> list[Completion]:
    """This replica's thinkings, up to and including the token `end` that ends one, where they reach it."""
    stops = (*sampling.stop_token_ids, end)
    return generate(inference, requests, replace(sampling, stop_token_ids=stops), entries)


def respond(
    inference: Inference,
    end: int,
    thinkings: Thinkings,
    sampling: Sampling,
    responder: Responder,
    entries: Entries | None = None,
) -> list[Output]:
    """Let the responder answer each of this replica's thinkings.

    `entries` has the keys of the thinkings' requests; that of the j-th response to one is its branch (j,). The budget
    `sampling.max_tokens` is for both parts together. A thinking without its `end`, or with no token left for an
    answer, gets none. Collective: the engine may change its weights.
    """
    inference.use(responder.weights)
    tokens = sampling.max_tokens
    by_index = {request.index: request for request in thinkings.requests}
    ended = [z for z in thinkings.completions if z.token_ids[-1:] == (end,) and len(z.token_ids) < tokens]
    parts = [(z, number) for z in ended for number in range(responder.responses)]
    continued = [
        Request(
            prompt_token_ids=(*by_index[z.index].prompt_token_ids, *z.token_ids),
            index=index,
            seed=_response_seed(by_index[z.index].seed, number),
            max_tokens=tokens - len(z.token_ids),
        )
        for index, (z, number) in enumerate(parts)
    ]
    if entries is not None:
        keys = {i: entries.keys[z.index]._replace(branch=(number,)) for i, (z, number) in enumerate(parts)}
        entries = Entries(entries.journal, keys)
    left, known = split(continued, entries)
    # Every replica answers its own thinkings, so no token travels; the call itself is made by all.
    # With a seed of their own, for engines that draw unseeded requests from one generator.
    own = replace(sampling, seed=hash_seed("response", sampling.seed))
    written = together(inference.running_engine.generate(left, own, None, added_to(entries)), known, entries)
    answers: dict[int, list[Completion]] = {}
    for one in written:
        answers.setdefault(parts[one.index][0].index, []).append(one)
    writers = (thinkings.weights, responder.weights)
    return [_joined(z, tuple(answers.get(z.index, ())), writers) for z in thinkings.completions]


def _joined(thinking: Completion, responses: tuple[Completion, ...], writers: tuple[str, str]) -> Output:
    """A thinking with its responses, the first of which stands in the output."""
    if not responses:
        return Output(thinking, stretches=stretches_of((thinking, writers[0])))
    first = responses[0]
    stretches = stretches_of((thinking, writers[0]), (first, writers[1]))
    tokens, log_probs = thinking.token_ids + first.token_ids, thinking.log_probs + first.log_probs
    # The record of the response has the thinking before it too; one of other weights says nothing about the policy.
    routed = first.routed_experts if writers[0] == writers[1] else thinking.routed_experts
    return Output(Completion(thinking.index, tokens, log_probs, first.finish_reason, routed), responses, stretches)


def split(requests: Sequence[Request], entries: Entries | None) -> tuple[list[Request], list[Request]]:
    """The requests that are left to make, and those whose completions are known."""
    if entries is None:
        return list(requests), []
    known = [request for request in requests if entries.journal.knows(entries.keys[request.index])]
    indices = {request.index for request in known}
    return [request for request in requests if request.index not in indices], known


def added_to(entries: Entries | None) -> Callable[[Completion], None] | None:
    """What is done with each completion as soon as it is made."""
    return None if entries is None else lambda one: entries.journal.add(entries.keys[one.index], one)


def _each(*actions: Callable[[Completion], None] | None) -> Callable[[Completion], None]:
    def act(completion: Completion) -> None:
        for action in actions:
            if action is not None:
                action(completion)

    return act


def together(made: list[Completion], known: Sequence[Request], entries: Entries | None) -> list[Completion]:
    """What was made and what was made before, in the order of the requests."""
    if entries is not None:
        made = made + [entries.journal.take(entries.keys[request.index], request.index) for request in known]
    return sorted(made, key=lambda completion: completion.index)


def _seed(config: RunConfig, step: int, key: Key, generation: Generation) -> int:
    """The seed of a sample."""
    occasion = _occasion(config, step, generation.weights)
    return sample_seed(config.seed, occasion, key.prompt, key.nth(generation.count), key.kind)


def _response_seed(seed: int | None, number: int) -> int | None:
    return None if seed is None else hash_seed("response", seed, number)


def is_seeded(config: RunConfig, weights: str) -> bool:
    seeded = config.rollout.seeded
    if _stays(config, weights):
        return True
    return repeats(config) if seeded is None else seeded


def _occasion(config: RunConfig, step: int, weights: str) -> int:
    """What stands for the step in seeds: what weights that stay write to a prompt is always the same."""
    return 0 if _stays(config, weights) else step


def _stays(config: RunConfig, weights: str) -> bool:
    """Whether a parameter set is the same in every step."""
    return weights != POLICY and weights not in Implied(config).trained_sets
