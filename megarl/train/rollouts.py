"""The rollout half of a step: prompts in, graded groups out.

A replica's first rank keeps the tokens of the samples its engine made. All ranks get the metadata
(rewards, lengths, who holds what), which is all that advantages and selection need.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

from megarl.errors import Refusal, ScoringStopped, TrainingStopped
from megarl.parallel.exchange import gather_all
from megarl.records import Sample
from megarl.rollout.engine import Request
from megarl.train import explanations, replay
from megarl.train.generation import (
    Job,
    Output,
    answer_seed,
    generate,
    respond,
    sampling_of,
    think,
    weight_set,
)
from megarl.train.groups import Rollouts, Score
from megarl.train.scoring import Graded, grade
from megarl.train.serving import serve
from megarl.train.session import Session


def make_rollouts(session: Session, step: int) -> Rollouts:
    """Generate and grade until there are enough groups to train on, or the algorithm's bound is reached.

    Collective. The engine must be awake unless the rollouts are replayed. Raises `TrainingStopped` on all ranks where
    the rewards cannot be found any more.
    """
    wanted = session.config.batch.prompts
    size = session.config.batch.generation_prompts or wanted
    rollouts = Rollouts(session.config.rollout.group_size)
    if session.scorer is not None:
        session.scorer.begin_step()
    for batch in range(session.algorithm.needs.max_generation_batches):
        first = len(rollouts.prompts)
        rollouts.prompts += [session.data.prompts[i] for i in session.stream.take(size)]
        _sample_batch(session, rollouts, step, batch, first)
        for group in range(first, len(rollouts.prompts)):
            reason = _drop_reason(session, rollouts, group)
            if reason is None:
                rollouts.kept.append(group)
            else:
                rollouts.count("groups_dropped")
                rollouts.count(reason)
        if len(rollouts.kept) >= wanted:
            break
    rollouts.count("groups_surplus", max(0, len(rollouts.kept) - wanted))
    del rollouts.kept[wanted:]
    return rollouts


def _drop_reason(session: Session, rollouts: Rollouts, group: int) -> str | None:
    if any(score.reward is None for score in rollouts.scores_of(group)):
        return "groups_unscored"
    return session.algorithm.drop_reason(rollouts.outcome(group))


def _sample_batch(session: Session, rollouts: Rollouts, step: int, batch: int, first: int) -> None:
    """Generate the groups from `first` on, grade what this rank holds, and tell everyone."""
    jobs = _answer_jobs(session, rollouts, step, first)
    jobs += explanations.jobs(session, rollouts, step, first, len(jobs))
    failure = None
    samples: dict[int, Sample] = {}
    thinking: dict[int, int | None] = {}
    tokens: Counter[str] = Counter()
    if session.config.rollout.replay is not None:
        samples, thinking = _replayed(session, rollouts, step, jobs)
    else:
        with session.clock.phase("generate"):
            outputs = _outputs(session, step, batch, jobs)
        if session.scorer is not None:
            prompts = [rollouts.prompts[jobs[o.completion.index].group] for o in outputs]
            with session.clock.phase("score"):
                try:
                    graded = grade(session, session.scorer, prompts, outputs, session.config.reward)
                except ScoringStopped as error:
                    failure, graded, outputs = str(error), [], []
            for output, one in zip(outputs, graded, strict=True):
                position = output.completion.index
                samples[position] = _sample(rollouts, jobs[position], output, one, session)
                thinking[position] = one.thinking_length
                tokens += _tokens(jobs[position], output)
    with session.clock.phase("score"):
        _tell_everyone(session, rollouts, jobs, samples, thinking, tokens, failure)
        explanations.tell_everyone(session, rollouts, step, first, jobs, samples)


def _answer_jobs(session: Session, rollouts: Rollouts, step: int, first: int) -> list[Job]:
    size = rollouts.group_size
    jobs = []
    for group in range(first, len(rollouts.prompts)):
        prompt = rollouts.prompts[group]
        start = rollouts.sample_index(group, 0, size)
        for k in range(size):
            seed = answer_seed(session, step, prompt.index, start + k)
            jobs.append(Job(group, k, Request(prompt.token_ids, len(jobs), seed)))
    return jobs


def _outputs(session: Session, step: int, batch: int, jobs: Sequence[Job]) -> list[Output]:
    """What this rank's replica makes of the jobs, all of which go to the engine in one call."""
    needs, sampling = session.algorithm.needs, sampling_of(session, step, batch)
    requests = [job.request for job in jobs]
    serve(session, weight_set(needs.rollout_weights))
    if needs.responder is None:
        assert session.engine is not None
        return [Output(completion) for completion in generate(session.engine, requests, sampling, session.config)]
    thinkings = think(session, requests, sampling)
    weights = weight_set(needs.responder.weights)
    return respond(session, thinkings, requests, sampling, weights, needs.responder.responses)


def _tokens(job: Job, output: Output) -> Counter[str]:
    """Tokens that the engine made for a job, by kind."""
    made = len(output.completion.token_ids) + sum(len(response.token_ids) for response in output.responses[1:])
    return Counter({job.kind: made})


def _sample(rollouts: Rollouts, job: Job, output: Output, graded: Graded, session: Session) -> Sample:
    completion = output.completion
    return Sample(
        prompt_index=rollouts.prompts[job.group].index,
        sample_index=_sample_index(session, rollouts, job),
        token_ids=completion.token_ids,
        rollout_log_probs=completion.log_probs,
        finish_reason=completion.finish_reason,
        seed=job.request.seed or 0,
        text=graded.text,
        reward=graded.reward,
        kind=job.kind,
        reward_counters=graded.counters,
    )


def _sample_index(session: Session, rollouts: Rollouts, job: Job) -> int:
    needs = session.algorithm.needs
    per_prompt = rollouts.group_size
    if job.kind == "explanation" and needs.explanations is not None:
        per_prompt = needs.explanations.per_prompt
    return rollouts.sample_index(job.group, job.number, per_prompt)


def _replayed(
    session: Session, rollouts: Rollouts, step: int, jobs: Sequence[Job]
) -> tuple[dict[int, Sample], dict[int, int | None]]:
    """This rank's part of the saved samples that stand for `jobs`, and where their thinking ends."""
    source = session.config.rollout.replay
    assert source is not None
    keys = [(rollouts.prompts[j.group].index, _sample_index(session, rollouts, j), j.kind) for j in jobs]
    with session.clock.phase("replay"):
        samples = replay.read_samples(source, step, keys, session.world)
    thinking: dict[int, int | None] = dict.fromkeys(samples)
    if session.algorithm.needs.thinking:
        for position, sample in samples.items():
            split = session.thinking_end.split(sample.token_ids)
            thinking[position] = split if isinstance(split, int) else None
    return samples, thinking


def _tell_everyone(
    session: Session,
    rollouts: Rollouts,
    jobs: Sequence[Job],
    samples: dict[int, Sample],
    thinking: dict[int, int | None],
    tokens: Counter[str],
    failure: str | None,
) -> None:
    """Exchange metadata, and the texts of the samples that are to be shown; keep this rank's samples."""
    size, rank = rollouts.group_size, session.world.rank
    answers = {jobs[i].group * size + jobs[i].number: i for i in samples if jobs[i].kind == "answer"}
    rollouts.mine |= {number: samples[i] for number, i in answers.items()}
    rollouts.explanations += [samples[i] for i in samples if jobs[i].kind == "explanation"]
    scores = {
        number: Score(s.reward, len(s.token_ids), s.finish_reason == "stop", rank, thinking[i])
        for number, i in answers.items()
        for s in [samples[i]]
    }
    shown = session.config.logging.samples
    texts = {
        number: dataclasses.replace(samples[i], rollout_log_probs=(), token_ids=())
        for number, i in answers.items()
        if number < shown
    }
    counters: Counter[str] = Counter(session.scorer.take_counters() if session.scorer is not None else {})
    for sample in samples.values():
        counters.update(sample.reward_counters)
    to_show: dict[int, Sample] = {}
    failures: list[str] = []
    for other_scores, other_texts, other_counters, other_tokens, other_failure in gather_all(
        (scores, texts, dict(counters), tokens, failure)
    ):
        rollouts.scores |= other_scores
        to_show |= other_texts
        rollouts.generated_tokens += other_tokens
        for name, amount in other_counters.items():
            rollouts.count(name, amount)
        failures += [other_failure] if other_failure else []
    if failures:
        raise TrainingStopped(failures[0])
    expected = {job.group * size + job.number for job in jobs if job.kind == "answer"}
    missing = expected - rollouts.scores.keys()
    if missing:
        raise Refusal(
            f"{len(missing)} of {len(expected)} samples of this step",
            "must be there before a step can train on them",
            "replay a step that was saved whole",
        )
    rollouts.shown += [to_show[i] for i in sorted(to_show)]
