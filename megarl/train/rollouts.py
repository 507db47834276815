"""The rollout half of a step: prompts in, graded groups out.

A replica's first rank keeps the tokens of the samples its engine made. All ranks get the heads of the trajectories
(rewards, lengths, who holds what), which is all that advantages and selection need.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from megarl.algorithms import declared
from megarl.algorithms.base import Algorithm, Group
from megarl.algorithms.plan import Plan, Text
from megarl.config.schema import RunConfig
from megarl.data.thinking import ThinkingEnd
from megarl.data.tokenizer import Tokenizer
from megarl.errors import Refusal, ScoringStopped, TrainingStopped
from megarl.parallel.cpu_platform import has_cuda
from megarl.parallel.exchange import gather_all
from megarl.records import DEMONSTRATION, Body, Head, Key, Trajectory
from megarl.rollout.play import Played
from megarl.train import continuing, generation, replay, texts, trust
from megarl.train.generation import Job
from megarl.train.groups import Begun, Kept, Made, Rollouts, added, draw
from megarl.train.journal import Journal, step_journal
from megarl.train.outputs import Output
from megarl.train.scoring import Grading
from megarl.train.session import Session, unfinished_directory


def roll_out(
    session: Session, plan: Plan, step: int, begun: Begun | None = None, *, draws: bool = True, first_batch: int = 0
) -> Rollouts:
    """The step's groups; the engine is awake while they are generated. Collective.

    The continuations of what was `begun` are made beside, in the first call of the engine; without `draws` they alone,
    and there are no groups. `first_batch`: the number of the first generation batch within the step.

    Where the rewards cannot be found any more, or the plan or a text goes beyond what the settings declare, all ranks
    raise `TrainingStopped` with the policy's memory back; where the run was asked to stop and the step would not end in
    time, `StopAsked`. Raises `EngineChanged` on all ranks where an engine's weights have changed since the push.
    """
    declared.stop_at(declared.of_plan(plan, session.config))
    if not plan.generations:
        return make_rollouts(session, plan, step)
    with trust.discarding(session, step), session.inference.awake(plan.generations[0].weights):
        return make_rollouts(session, plan, step, begun, draws=draws, first_batch=first_batch)


def make_rollouts(
    session: Session, plan: Plan, step: int, begun: Begun | None = None, *, draws: bool = True, first_batch: int = 0
) -> Rollouts:
    """Draw, generate and grade until there are enough groups to train on, or the plan's bound is reached.

    What an attempt at this step that was cut short has made already is taken from its journal. Collective. The engine
    must be awake unless the rollouts are replayed or nothing is generated. Raises `TrainingStopped` on all ranks where
    the rewards cannot be found any more, `StopAsked` where the run was asked to stop and the step would not end in
    time.
    """
    wanted = plan.prompts or session.config.batch.prompts
    size = (session.config.batch.generation_prompts or wanted) if plan.batches > 1 else wanted
    if session.grading is not None and not first_batch:
        session.grading.scoring.begin_step()
    journal = _journal(session, plan, step, say=not first_batch)
    made, kept = Made(), Kept()
    for batch in range(plan.batches):
        groups = draw(session.data.draw(size) if draws else (), made.groups)
        new = _make_batch(session, plan, step, first_batch + batch, groups, journal, None if batch else begun)
        made += new
        kept = keep(session.algorithm, plan, kept, new.groups)
        # Where nothing gets a reward any more, such as after the judge's cost cap, more answers would not either.
        if len(kept.groups) >= wanted or all(is_unscored(plan, group) for group in new.groups):
            break
    if journal is not None:
        journal.close()
    surplus = {"groups_surplus": max(0, len(kept.groups) - wanted)}
    made, demonstrations = _with_demonstrations(session, plan, made) if draws else (made, ())
    return Rollouts(made, Kept(kept.groups[:wanted], added(kept.counters, surplus)), demonstrations)


def _with_demonstrations(session: Session, plan: Plan, made: Made) -> tuple[Made, tuple[Group, ...]]:
    """What was made, and the step's demonstrations, in groups after all others."""
    data = session.data.demonstrations
    if not plan.demonstrations:
        return made, ()
    assert data is not None
    with session.clock.phase("data"):
        drawn, counters = data.draw(plan.demonstrations)
    groups: list[Group] = []
    bodies = dict(made.bodies)
    for group, (_, ids) in zip(draw([prompt for prompt, _ in drawn]), drawn, strict=True):
        key = Key(group.prompt.index, group.draw, 0, DEMONSTRATION)
        head, body = texts.trajectory_of(Text(ids), key, None)
        groups.append(dataclasses.replace(group, number=len(made.groups) + group.number, heads=(head,)))
        bodies[key] = body
    return dataclasses.replace(made, bodies=bodies, counters=added(made.counters, counters)), tuple(groups)


def keep(algorithm: Algorithm, plan: Plan, before: Kept, groups: Sequence[Group]) -> Kept:
    """What is kept `before`, and those of `groups` that can be trained on."""
    kept, counters = list(before.groups), dict(before.counters)
    for group in groups:
        reason = "groups_unscored" if is_unscored(plan, group) else algorithm.drop_reason(group)
        if reason is None:
            kept.append(group)
        else:
            counters = added(counters, {"groups_dropped": 1, reason: 1})
    return Kept(tuple(kept), counters)


def is_unscored(plan: Plan, group: Group) -> bool:
    """Whether an answer of the group has no reward, though it needs one."""
    needed = any(one.kind == "answer" and one.graded and one.needs_reward for one in plan.generations)
    return needed and any(head.reward is None for head in group.answers)


def _keeps_unfinished(config: RunConfig) -> bool:
    """Whether completions are kept before their step is; without a word not where others would then have other bits."""
    asked = config.rollout.keep_unfinished
    return not (config.deterministic and has_cuda()) if asked is None else asked


def _journal(session: Session, plan: Plan, step: int, *, say: bool) -> Journal | None:
    """The journal of the step's completions; None where none are made, or they come with what it does not keep."""
    config, engine = session.config, session.inference.engine
    if engine is None or not plan.generations:
        return None
    if config.rollout.replay is not None or config.moe.routing_replay != "off" or not _keeps_unfinished(config):
        return None
    journal = step_journal(unfinished_directory(config), step, config, rank=session.world.rank, writes=engine.speaks)
    if say and len(journal):
        session.recorder.status(f"step {step}: {len(journal)} completions were made before")
    return journal


def _make_batch(
    session: Session,
    plan: Plan,
    step: int,
    batch: int,
    groups: tuple[Group, ...],
    journal: Journal | None,
    begun: Begun | None,
) -> Made:
    """Generate for `groups`, grade what this rank holds, and tell everyone; then the texts that need no engine."""
    made = Made(groups)
    if plan.generations:
        made = _generate_batch(session, plan, step, batch, groups, journal, begun)
    if plan.solutions:
        with session.clock.phase("data"):
            solutions, counters = texts.of_solutions(groups, session.tokenizer, session.config.rollout.max_tokens)
        made = _with_texts(made, solutions, counters)
    return made


def _generate_batch(
    session: Session,
    plan: Plan,
    step: int,
    batch: int,
    groups: tuple[Group, ...],
    journal: Journal | None,
    begun: Begun | None,
) -> Made:
    jobs, counters = generation.jobs(
        session.config,
        plan,
        step,
        groups,
        lambda one, group: session.texts.of(one, group.prompt.index, step) is not None,
    )
    continued = [] if begun is None else continuing.jobs(session.config, plan, step, begun, len(jobs))
    kept = sum(job.fork.place for job in continued if job.fork is not None)
    counters = added(counters, {"generation_calls": 1, "prefix_tokens_reused": kept} if plan.grows else {})
    jobs += continued
    samples: dict[int, Trajectory] = {}
    tokens: dict[str, int] = {}
    engine, failure = session.inference.engine, None
    before = engine.tokens_generated if engine is not None else 0
    if session.config.rollout.replay is not None:
        samples = _replayed(session, step, jobs)
    else:
        with session.clock.phase("generate"):
            if begun is not None and continued:
                outputs = continuing.outputs(session, step, batch, jobs, journal, begun.bodies)
            else:
                outputs = generation.outputs(session, step, batch, jobs, journal)
            assert engine is not None
            session.stops.give_up_if(engine.interrupted or session.stops.too_late)
        if session.grading is not None:
            with session.clock.phase("score"):
                try:
                    samples = _samples(session, session.grading, jobs, outputs)
                except ScoringStopped as error:
                    failure = str(error)
            for output in outputs:
                job = jobs[output.completion.index]
                name = job.key.kind if job.fork is None else "continuation"
                tokens = added(tokens, {name: output.tokens_made})
    with session.clock.phase("score"):
        pumped = engine.tokens_generated - before if engine is not None and engine.speaks else 0
        made = _told(session, plan, step, groups, jobs, samples, tokens, pumped, failure)
        return _with_texts(made, *texts.cached(session.texts, plan, step, groups), counters)


def _samples(
    session: Session, grading: Grading, jobs: Sequence[Job], outputs: Sequence[Output]
) -> dict[int, Trajectory]:
    """The outputs as samples, graded, by position in `jobs`."""
    asked = [one for one in outputs if jobs[one.completion.index].generation.graded]
    prompts = [jobs[one.completion.index].group.prompt for one in asked]
    graded = grading.grade(prompts, asked)
    by_position = {output.completion.index: one for output, one in zip(asked, graded, strict=True)}
    samples = {}
    for output in outputs:
        completion, played = output.completion, output.played
        job, one = jobs[completion.index], by_position.get(completion.index)
        head = Head(job.key, session.world.rank, output.stretches, completion.finish_reason)
        old = ()
        if job.fork is not None:
            known = min(output.kept, continuing.head_of(job).old_known)
            head = dataclasses.replace(head, fork=output.kept, old_known=known)
            old = output.old_log_probs[:known]
        text = session.tokenizer.decode(completion.token_ids) if one is None else one.text
        seed = job.request.seed or 0
        routed = completion.routed_experts
        body = Body(completion.token_ids, completion.log_probs, text, seed, routed_experts=routed, old_log_probs=old)
        if played is not None:
            head, body = _with_turns(session.tokenizer, job, played, Trajectory(head, body))
        elif job.generation.learn is None and job.generation.prompt is not None:
            # It is trained after what it answers.
            head, body = _after(job.request.prompt_token_ids, Trajectory(head, body))
        if one is not None:
            marks = {} if one.thinking_length is None or played is not None else {"thinking": one.thinking_length}
            head = dataclasses.replace(head, reward=one.reward, reward_terms=one.terms, marks=marks)
            body = dataclasses.replace(body, counters=one.counters)
        samples[completion.index] = Trajectory(head, body)
    return samples


def _with_turns(tokenizer: Tokenizer, job: Job, played: Played, sample: Trajectory) -> Trajectory:
    """A sample of several turns, with their texts, and with the prompt where that was the environment's."""
    head, body = sample
    texts = tuple(tokenizer.decode(body.token_ids[one.start : one.end]) for one in head.stretches)
    body = dataclasses.replace(body, texts=texts, counters=played.counters)
    made = Trajectory(head, body)
    return made if played.prompt_token_ids == job.group.prompt.token_ids else _after(played.prompt_token_ids, made)


def _after(prompt_ids: tuple[int, ...], sample: Trajectory) -> Trajectory:
    """A sample that answers a prompt of its own, and not the data's."""
    head = dataclasses.replace(sample.head, prompt_length=len(prompt_ids))
    return Trajectory(head, dataclasses.replace(sample.body, prompt_ids=prompt_ids))


def _replayed(session: Session, step: int, jobs: Sequence[Job]) -> dict[int, Trajectory]:
    """This rank's part of the saved samples that stand for `jobs`."""
    source = session.config.rollout.replay
    assert source is not None
    with session.clock.phase("replay"):
        samples = replay.read_samples(source, step, [job.key for job in jobs], session.world.rank, session.world.size)
    if not session.algorithm.splits_thinking:
        return samples
    return {position: _with_thinking(session.thinking_end, sample) for position, sample in samples.items()}


def _with_thinking(thinking_end: ThinkingEnd, sample: Trajectory) -> Trajectory:
    """A saved sample with the end of its thinking, which a run that did not need it did not save."""
    if "thinking" in sample.head.marks:
        return sample
    split = thinking_end.split(sample.body.token_ids)
    marks = {**sample.head.marks, "thinking": split} if isinstance(split, int) else sample.head.marks
    return sample._replace(head=dataclasses.replace(sample.head, marks=marks))


class _Told(NamedTuple):
    """What a rank tells the others of a generation batch."""

    heads: list[Head]
    kept: list[tuple[Key, Text]]
    counters: dict[str, int]
    tokens: dict[str, int]
    engine_tokens: int
    samples: int
    reward_failure: str | None
    failure: str | None


def _told(
    session: Session,
    plan: Plan,
    step: int,
    groups: tuple[Group, ...],
    jobs: Sequence[Job],
    samples: dict[int, Trajectory],
    tokens: dict[str, int],
    engine_tokens: int,
    failure: str | None,
) -> Made:
    """Exchange heads, and the texts that are used again. Collective."""
    trajectories, counters = texts.learned(jobs, samples, session.world.rank)
    scoring = None if session.grading is None else session.grading.scoring
    counters = added(counters, scoring.take_counters() if scoring is not None else {})
    answers = {job.key: samples[i] for i, job in enumerate(jobs) if i in samples and job.key.kind == "answer"}
    counters = added(counters, *(sample.body.counters for sample in answers.values()))
    cached = {one.kind for one in plan.generations if one.refresh_every > 1}
    mine = _Told(
        heads=[one.head for one in trajectories],
        kept=[(h.key, Text(b.token_ids, h.marks)) for h, b in trajectories if h.key.kind in cached],
        counters=counters,
        tokens=tokens,
        engine_tokens=engine_tokens,
        samples=len(samples),
        reward_failure=scoring.take_first_failure() if scoring is not None else None,
        failure=failure,
    )
    told: list[_Told] = gather_all(mine)
    failures = [one.failure for one in told if one.failure]
    if failures:
        raise TrainingStopped(failures[0])
    reward_failure = next((one.reward_failure for one in told if one.reward_failure), None)
    session.recorder.failure(reward_failure)
    missing = len(jobs) - sum(one.samples for one in told)
    if missing > 0:
        raise Refusal(
            f"{missing} of {len(jobs)} samples of this step",
            "must be there before a step can train on them",
            "replay a step that was saved whole, by a run with the same prompts, group size and own texts",
        )
    made_texts = {one.kind for one in plan.generations if one.learn is not None}
    for head in (head for one in told for head in one.heads if head.key.kind in made_texts):
        declared.stop_at(declared.of_text(head.key.kind, head.length, session.config))
    for key, text in sorted((pair for one in told for pair in one.kept), key=lambda pair: pair[0]):
        session.texts.keep(step, key, text)
    heads = [head for one in told for head in one.heads]
    return Made(
        groups=_with_heads(groups, plan, [head for head in heads if head.parent is None]),
        continuations=tuple(sorted((head for head in heads if head.parent is not None), key=lambda head: head.key)),
        counters=added(*(one.counters for one in told)),
        generated_tokens=added(*(one.tokens for one in told)),
        engine_tokens=sum(one.engine_tokens for one in told),
        reward_failure=reward_failure,
        bodies={head.key: body for head, body in trajectories},
        written=tuple(samples[position] for position in sorted(samples)),
    )


def _with_texts(made: Made, found: Sequence[Trajectory], *counters: dict[str, int]) -> Made:
    """What was made, and texts that every rank holds."""
    heads: dict[tuple[int, int], list[Head]] = {}
    for head, _ in found:
        heads.setdefault(head.key[:2], []).append(head)
    groups = (
        dataclasses.replace(group, heads=group.heads + tuple(heads.get((group.prompt.index, group.draw), ())))
        for group in made.groups
    )
    bodies = {**made.bodies, **{head.key: body for head, body in found}}
    return dataclasses.replace(made, groups=tuple(groups), bodies=bodies, counters=added(made.counters, *counters))


def _with_heads(groups: Sequence[Group], plan: Plan, heads: Sequence[Head]) -> tuple[Group, ...]:
    """The groups with the heads that are theirs, by kind as the plan has them, and in order within."""
    kinds = {one.kind: number for number, one in enumerate(plan.generations)}
    ordered: dict[tuple[int, int], list[Head]] = {}
    for head in sorted(heads, key=lambda head: (kinds[head.key.kind], head.key)):
        ordered.setdefault(head.key[:2], []).append(head)
    return tuple(
        dataclasses.replace(group, heads=tuple(ordered.get((group.prompt.index, group.draw), ()))) for group in groups
    )
