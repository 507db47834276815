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
from megarl.rewards.scorer import Scoring
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
from megarl.train.journal import Journal, Kept
from megarl.train.replay import Key
from megarl.train.scoring import grade
from megarl.train.serving import serve
from megarl.train.session import Session, unfinished_directory


def make_rollouts(session: Session, step: int) -> Rollouts:
    """Generate and grade until there are enough groups to train on, or the algorithm's bound is reached.

    What an attempt at this step that was cut short has made already is taken from its journal. Collective. The engine
    must be awake unless the rollouts are replayed. Raises `TrainingStopped` on all ranks where the rewards cannot be
    found any more, `StopAsked` where the run was asked to stop and the step would not end in time.
    """
    wanted, batches = session.config.batch.prompts, session.algorithm.needs.max_generation_batches
    size = (session.config.batch.generation_prompts or wanted) if batches > 1 else wanted
    rollouts = Rollouts(session.config.rollout.group_size)
    if session.scorer is not None:
        session.scorer.begin_step()
    journal = _journal(session, step)
    for batch in range(batches):
        first = len(rollouts.prompts)
        rollouts.draw(session.data.prompts[i] for i in session.stream.take(size))
        _sample_batch(session, rollouts, step, batch, first, journal)
        for group in range(first, len(rollouts.prompts)):
            reason = _drop_reason(session, rollouts, group)
            if reason is None:
                rollouts.kept.append(group)
            else:
                rollouts.count("groups_dropped")
                rollouts.count(reason)
        unscored = [_unscored(rollouts, group) for group in range(first, len(rollouts.prompts))]
        # Where nothing gets a reward any more, such as after the judge's cost cap, more answers would not either.
        if len(rollouts.kept) >= wanted or all(unscored):
            break
    if journal is not None:
        journal.close()
    rollouts.count("groups_surplus", max(0, len(rollouts.kept) - wanted))
    del rollouts.kept[wanted:]
    return rollouts


def _drop_reason(session: Session, rollouts: Rollouts, group: int) -> str | None:
    if _unscored(rollouts, group):
        return "groups_unscored"
    return session.algorithm.drop_reason(rollouts.outcome(group))


def _unscored(rollouts: Rollouts, group: int) -> bool:
    return any(score.reward is None for score in rollouts.scores_of(group))


def _journal(session: Session, step: int) -> Journal | None:
    """The journal of the step's completions; None where none are made, or they come with what it does not keep."""
    config, engine = session.config, session.engine
    if engine is None or config.rollout.replay is not None or config.moe.routing_replay != "off":
        return None
    if not config.rollout.keep_unfinished:
        return None
    journal = Journal(unfinished_directory(config), step, config, rank=session.world.rank, writes=engine.speaks)
    if len(journal):
        session.recorder.status(f"step {step}: {len(journal)} completions were made before")
    return journal


def _sample_batch(
    session: Session, rollouts: Rollouts, step: int, batch: int, first: int, journal: Journal | None
) -> None:
    """Generate the groups from `first` on, grade what this rank holds, and tell everyone."""
    jobs = _answer_jobs(session, rollouts, step, first)
    jobs += explanations.jobs(session, rollouts, step, first, len(jobs))
    failure = None
    samples: dict[int, Sample] = {}
    tokens: Counter[str] = Counter()
    if session.config.rollout.replay is not None:
        samples = _replayed(session, rollouts, step, jobs)
    else:
        with session.clock.phase("generate"):
            outputs = _outputs(session, rollouts, step, batch, jobs, journal)
            assert session.engine is not None
            session.stops.give_up_if(session.engine.interrupted or session.stops.too_late)
        if session.scorer is not None:
            with session.clock.phase("score"):
                try:
                    samples = _samples(session, session.scorer, rollouts, jobs, outputs)
                except ScoringStopped as error:
                    failure = str(error)
            for output in outputs:
                tokens += _tokens(jobs[output.completion.index], output)
    with session.clock.phase("score"):
        _tell_everyone(session, rollouts, jobs, samples, tokens, failure)
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


def _outputs(
    session: Session, rollouts: Rollouts, step: int, batch: int, jobs: Sequence[Job], journal: Journal | None
) -> list[Output]:
    """What this rank's replica makes of the jobs, all of which go to the engine in one call."""
    needs, sampling = session.algorithm.needs, sampling_of(session, step, batch)
    requests = [job.request for job in jobs]

    def kept(kind: str | None = None, per_job: int = 1) -> Kept | None:
        """By number of the answer to a job, or of one of `per_job` parts of it."""

        def key_of(index: int) -> Key:
            job = jobs[index // per_job]
            sample = _sample_index(session, rollouts, job) * per_job + index % per_job
            return rollouts.prompts[job.group].index, sample, kind or job.kind

        return None if journal is None else Kept(journal, key_of)

    serve(session, weight_set(needs.rollout_weights))
    if needs.responder is None:
        return [Output(completion) for completion in generate(session, requests, sampling, kept())]
    thinkings = think(session, requests, sampling, kept("thinking"))
    weights, responses = weight_set(needs.responder.weights), needs.responder.responses
    return respond(session, thinkings, requests, sampling, weights, responses, kept("response", responses))


def _tokens(job: Job, output: Output) -> Counter[str]:
    """Tokens that the engine made for a job, by kind."""
    made = len(output.completion.token_ids) + sum(len(response.token_ids) for response in output.responses[1:])
    return Counter({job.kind: made})


def _samples(
    session: Session, scoring: Scoring, rollouts: Rollouts, jobs: Sequence[Job], outputs: Sequence[Output]
) -> dict[int, Sample]:
    """The outputs as samples, graded, by position in `jobs`."""
    asked = [o for o in outputs if jobs[o.completion.index].kind == "answer" or explanations.graded(session)]
    prompts = [rollouts.prompts[jobs[o.completion.index].group] for o in asked]
    graded = grade(session, scoring, prompts, asked)
    by_position = {o.completion.index: one for o, one in zip(asked, graded, strict=True)}
    samples = {}
    for output in outputs:
        completion = output.completion
        job, one = jobs[completion.index], by_position.get(completion.index)
        samples[completion.index] = Sample(
            prompt_index=rollouts.prompts[job.group].index,
            sample_index=_sample_index(session, rollouts, job),
            token_ids=completion.token_ids,
            rollout_log_probs=completion.log_probs,
            finish_reason=completion.finish_reason,
            seed=job.request.seed or 0,
            text=session.tokenizer.decode(completion.token_ids) if one is None else one.text,
            reward=None if one is None else one.reward,
            kind=job.kind,
            thinking_length=None if one is None else one.thinking_length,
            reward_counters={} if one is None else one.counters,
            reward_terms={} if one is None else one.terms,
            routed_experts=completion.routed_experts,
        )
    return samples


def _sample_index(session: Session, rollouts: Rollouts, job: Job) -> int:
    needs = session.algorithm.needs
    per_prompt = rollouts.group_size
    if job.kind == "explanation" and needs.explanations is not None:
        per_prompt = needs.explanations.per_prompt
    return rollouts.sample_index(job.group, job.number, per_prompt)


def _replayed(session: Session, rollouts: Rollouts, step: int, jobs: Sequence[Job]) -> dict[int, Sample]:
    """This rank's part of the saved samples that stand for `jobs`."""
    source = session.config.rollout.replay
    assert source is not None
    keys = [(rollouts.prompts[j.group].index, _sample_index(session, rollouts, j), j.kind) for j in jobs]
    with session.clock.phase("replay"):
        samples = replay.read_samples(source, step, keys, session.world.rank, session.world.size)
    if not session.algorithm.needs.thinking:
        return samples
    return {position: _with_thinking(session, sample) for position, sample in samples.items()}


def _with_thinking(session: Session, sample: Sample) -> Sample:
    """A saved sample with the length of its thinking, which a run that did not need it did not save."""
    if sample.thinking_length is not None:
        return sample
    split = session.thinking_end.split(sample.token_ids)
    return dataclasses.replace(sample, thinking_length=split if isinstance(split, int) else None)


def _tell_everyone(
    session: Session,
    rollouts: Rollouts,
    jobs: Sequence[Job],
    samples: dict[int, Sample],
    tokens: Counter[str],
    failure: str | None,
) -> None:
    """Exchange metadata, and the texts of the samples that are to be shown; keep this rank's samples."""
    size, rank = rollouts.group_size, session.world.rank
    answers = {jobs[i].group * size + jobs[i].number: s for i, s in samples.items() if s.kind == "answer"}
    rollouts.mine |= answers
    rollouts.explanations += [sample for sample in samples.values() if sample.kind == "explanation"]
    scores = {
        number: Score(s.reward, len(s.token_ids), s.finish_reason == "stop", rank, s.thinking_length, s.reward_terms)
        for number, s in answers.items()
    }
    texts = {
        number: dataclasses.replace(sample, rollout_log_probs=(), token_ids=(), routed_experts=None)
        for number, sample in answers.items()
        if number < session.config.logging.samples
    }
    counters: Counter[str] = Counter(session.scorer.take_counters() if session.scorer is not None else {})
    failed = session.scorer.take_first_failure() if session.scorer is not None else None
    for sample in answers.values():
        counters.update(sample.reward_counters)
    to_show: dict[int, Sample] = {}
    failures: list[str] = []
    found = 0
    for other_scores, other_texts, other_counters, other_tokens, other_count, other_failed, other_failure in gather_all(
        (scores, texts, dict(counters), tokens, len(samples), failed, failure)
    ):
        rollouts.scores |= other_scores
        to_show |= other_texts
        rollouts.generated_tokens += other_tokens
        found += other_count
        for name, amount in other_counters.items():
            rollouts.count(name, amount)
        rollouts.reward_failure = rollouts.reward_failure or other_failed
        failures += [other_failure] if other_failure else []
    if failures:
        raise TrainingStopped(failures[0])
    session.tell_failure(rollouts.reward_failure)
    if found < len(jobs):
        raise Refusal(
            f"{len(jobs) - found} of {len(jobs)} samples of this step",
            "must be there before a step can train on them",
            "replay a step that was saved whole, by a run with the same prompts, group size and explanations",
        )
    rollouts.shown += [to_show[i] for i in sorted(to_show)]
