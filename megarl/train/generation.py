"""From prompts to generated tokens: what is asked of the engine, with which seeds, in one part or in two."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from megarl.config.parameter_sets import REFERENCE
from megarl.parallel.cpu_platform import has_cuda
from megarl.records import SampleKind
from megarl.rollout.engine import Completion, Request, Sampling
from megarl.rollout.seeds import batch_seed, hash_seed, sample_seed
from megarl.train.journal import Kept
from megarl.train.serving import serve
from megarl.train.session import Session


@dataclass(frozen=True, slots=True)
class Job:
    """One sample to generate, number `number` of its group: an answer, or an explanation.

    `request.index` is the job's position in the list of jobs that go to the engine together.
    """

    group: int
    number: int
    request: Request
    kind: SampleKind = "answer"


@dataclass(frozen=True, slots=True)
class Output:
    """What was generated for a request. Of responses to one thinking, `completion` holds the thinking with the first
    response; `responses` has the completions of them all, without the thinking."""

    completion: Completion
    responses: tuple[Completion, ...] = ()


def answer_seed(session: Session, step: int, prompt_index: int, sample_index: int) -> int | None:
    """The seed of an answer, or None where samples have none of their own."""
    if not _seeded(session):
        return None
    return sample_seed(session.config.seed, _draw_of(session, step), prompt_index, sample_index)


def explanation_seed(session: Session, step: int, prompt_index: int, sample_index: int) -> int | None:
    """The seed of an explanation, or None where samples have none of their own."""
    if not _seeded(session):
        return None
    return hash_seed("explanation", session.config.seed, _draw_of(session, step), prompt_index, sample_index)


def sampling_of(session: Session, step: int, batch: int) -> Sampling:
    """How generation batch `batch` of a step samples."""
    settings = session.config.rollout
    return Sampling(
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        stop_token_ids=settings.stop_token_ids,
        seed=batch_seed(session.config.seed, _draw_of(session, step), batch),
    )


def generate(
    session: Session, requests: Sequence[Request], sampling: Sampling, kept: Kept | None = None
) -> list[Completion]:
    """This replica's completions; fixed or drawn work by `rollout.deterministic`. The same on all its ranks.

    With `kept`, those that were made before are not made again: the replicas take them in turns.
    """
    assert session.engine is not None
    engine, deterministic = session.engine, session.config.rollout.deterministic
    fixed = not has_cuda() if deterministic is None else deterministic
    left, known = _split(requests, kept)
    work = engine.fixed_assignment(len(left)) if fixed else engine.shared_counter(len(left))
    made = engine.generate(left, sampling, work, _keeping(kept))
    return _together(made, known[engine.replica :: engine.num_replicas], kept)


def think(
    session: Session, requests: Sequence[Request], sampling: Sampling, kept: Kept | None = None
) -> list[Completion]:
    """This replica's thinkings, up to and including the end marker where they reach it."""
    assert session.thinking_end.token_id is not None
    stops = (*sampling.stop_token_ids, session.thinking_end.token_id)
    return generate(session, requests, replace(sampling, stop_token_ids=stops), kept)


def _split(requests: Sequence[Request], kept: Kept | None) -> tuple[list[Request], list[Request]]:
    """The requests that are left to make, and those whose completions are known."""
    if kept is None:
        return list(requests), []
    known = [request for request in requests if kept.journal.knows(kept.key_of(request.index))]
    indices = {request.index for request in known}
    return [request for request in requests if request.index not in indices], known


def _keeping(kept: Kept | None) -> Callable[[Completion], None] | None:
    """What is done with each completion as soon as it is made."""
    return None if kept is None else lambda one: kept.journal.add(kept.key_of(one.index), one)


def _together(made: list[Completion], known: Sequence[Request], kept: Kept | None) -> list[Completion]:
    """What was made and what was made before, in the order of the requests."""
    if kept is not None:
        made = made + [kept.journal.take(kept.key_of(request.index), request.index) for request in known]
    return sorted(made, key=lambda completion: completion.index)


def respond(
    session: Session,
    thinkings: Sequence[Completion],
    requests: Sequence[Request],
    sampling: Sampling,
    weights: str | None,
    responses: int = 1,
    kept: Kept | None = None,
) -> list[Output]:
    """Let the policy, or the weight set `weights`, write `responses` answers to each of this replica's thinkings.

    `requests` are those of the thinkings, by their index; `kept` has the keys of responses j to thinking z by the index
    z x `responses` + j; the budget `sampling.max_tokens` is for both parts
    together. A thinking without its end marker, or with no token left for an answer, gets none. Collective: the
    engine may change its weights.
    """
    serve(session, weights)
    assert session.engine is not None
    marker, tokens = session.thinking_end.token_id, sampling.max_tokens
    by_index = {request.index: request for request in requests}
    ended = [z for z in thinkings if z.token_ids[-1:] == (marker,) and len(z.token_ids) < tokens]
    continued = [
        Request(
            prompt_token_ids=(*by_index[z.index].prompt_token_ids, *z.token_ids),
            index=z.index * responses + j,
            seed=_response_seed(by_index[z.index].seed, j),
            max_tokens=tokens - len(z.token_ids),
        )
        for z in ended
        for j in range(responses)
    ]
    left, known = _split(continued, kept)
    # Every replica answers its own thinkings, so no token travels; the call itself is made by all.
    # With a seed of their own, for engines that draw unseeded requests from one generator.
    own = replace(sampling, seed=hash_seed("response", sampling.seed))
    written = _together(session.engine.generate(left, own, None, _keeping(kept)), known, kept)
    answers: dict[int, tuple[Completion, ...]] = {}
    for one in written:
        answers[one.index // responses] = (*answers.get(one.index // responses, ()), one)
    return [_output(thinking, answers.get(thinking.index, ()), weights is None) for thinking in thinkings]


def _output(thinking: Completion, responses: tuple[Completion, ...], same_weights: bool) -> Output:
    if not responses:
        return Output(thinking)
    first = responses[0]
    tokens, log_probs = thinking.token_ids + first.token_ids, thinking.log_probs + first.log_probs
    # The record of the response has the thinking before it too; one of other weights says nothing about the policy.
    routed = first.routed_experts if same_weights else thinking.routed_experts
    return Output(Completion(thinking.index, tokens, log_probs, first.finish_reason, routed), responses)


def _response_seed(seed: int | None, number: int) -> int | None:
    return None if seed is None else hash_seed("response", seed, number)


def _seeded(session: Session) -> bool:
    seeded = session.config.rollout.seeded
    if session.algorithm.needs.rollout_weights == "initial":
        return True
    return not has_cuda() if seeded is None else seeded


def _draw_of(session: Session, step: int) -> int:
    """What stands for the step in seeds: what the initial weights write to a prompt is the same in every step."""
    return 0 if session.algorithm.needs.rollout_weights == "initial" else step


def weight_set(weights: str) -> str | None:
    """The weight set that an algorithm's word means: None for the policy as it is."""
    return REFERENCE if weights == "initial" else None
