"""Evaluation: greedy accuracy, or avg@k, on the held-out file, through the same engine and rewards.

Cross-Generation (START, arXiv 2603.20799) measures the thinking alone: another policy, the consumer, answers the
policy's thinking, and its answers are scored.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from megarl.algorithms.plan import Responder
from megarl.config.implied import Implied
from megarl.config.parameter_sets import POLICY
from megarl.config.rewards import RewardSettings
from megarl.errors import ScoringStopped, TrainingStopped
from megarl.parallel.exchange import gather_all, gather_to_first
from megarl.records import Prompt
from megarl.rollout.engine import Completion, Request, Sampling
from megarl.rollout.play import Task
from megarl.rollout.seeds import hash_seed
from megarl.train import timeline
from megarl.train.generation import Thinkings, generate, respond, think
from megarl.train.journal import Entries
from megarl.train.outputs import Output
from megarl.train.played import play_outputs
from megarl.train.scoring import Graded, term_means
from megarl.train.session import Session
from megarl.train.shown import turn_rows
from megarl.train.sources import above_middle, by_source

#: A line of an evaluation's file after its place there.
_Row = tuple[tuple[bool, int], dict[str, Any]]


def evaluate_now(session: Session) -> dict[str, Any]:
    """Evaluate the current weights and record the result."""
    session.progress.evaluation_due = True
    with session.inference.awake(), session.clock.phase("evaluate"):
        result = evaluate(session, f"step_{session.progress.step:06d}")
    session.progress.evaluation_due = False
    session.recorder.evaluation({"step": session.progress.step, **result, "seconds": session.clock.take()})
    timeline.record(session, session.progress.step, "evaluation")
    return result


def evaluate(session: Session, name: str) -> dict[str, Any]:
    """Answer every prompt of the evaluation `evaluation.samples` times; the numbers are the same on every rank.

    The answers are kept under `name` where `evaluation.save` asks for it. Returns `accuracy` (share of scored answers
    with a reward above the middle of the reward's range) and, with the prefix `evaluation_`, `reward_mean`,
    `truncated_share`, `length_mean`, `problems`, `problems_in_training_data`, `samples`, `unscored`, `counters`,
    `reward_terms` (means of a sum's terms) and `reward_failure` where there are such; where the data has several
    sources also the numbers of `megarl.train.sources`. With `evaluation.consumer` policy and consumer answer the same
    thinkings with the same seeds; the consumer's numbers are `cross_accuracy` and so on. Collective; the engine must be
    awake with the current weights. Raises `TrainingStopped` on all ranks where rewards cannot be found any more, and
    `StopAsked` where the run was asked to stop and the evaluation would not end in time.
    """
    settings = session.config.evaluation
    assert session.data.held_out is not None
    engine = session.inference.running_engine
    prompts, k = session.data.held_out.prompts, settings.samples
    requests, sampling = requests_of(session), sampling_of(session)
    constants = {
        "evaluation_problems": len(prompts),
        "evaluation_problems_in_training_data": session.data.held_out_in_training,
        "evaluation_samples": k,
    }
    rows: list[_Row] = []
    consumer = Implied(session.config).consumer
    if consumer is None:
        # Before turns are graded, which happens while they are made.
        begin_grading(session)
        outputs = outputs_of(session, requests, sampling)
        session.stops.give_up_if(engine.interrupted)
        numbers = _numbers(session, outputs, "", "evaluation_", rows)
        _keep(session, name, rows)
        return numbers | constants
    # In two parts also for the policy itself, so that both answer under the same conditions.
    inference, end = session.inference, session.thinking_end.require_token()
    thinkings = Thinkings(think(inference, end, requests, sampling), requests)
    outputs = [respond(inference, end, thinkings, sampling, Responder(weights)) for weights in (POLICY, consumer)]
    session.stops.give_up_if(engine.interrupted)
    own, cross = outputs
    begin_grading(session)
    numbers = _numbers(session, own, "", "evaluation_", rows)
    begin_grading(session)
    numbers |= _numbers(session, cross, "cross_", "cross_", rows)
    _keep(session, name, rows)
    return numbers | constants


def requests_of(session: Session) -> list[Request]:
    """What is asked: every prompt of the evaluation `evaluation.samples` times, with seeds that are the same in every
    evaluation. Sample j of prompt i has the index i * samples + j."""
    assert session.data.held_out is not None
    k, seed = session.config.evaluation.samples, session.config.seed
    return [
        Request(prompt.token_ids, i * k + j, hash_seed("evaluation", seed, prompt.index, j))
        for i, prompt in enumerate(session.data.held_out.prompts)
        for j in range(k)
    ]


def sampling_of(session: Session) -> Sampling:
    """How the evaluation samples."""
    settings, rollout = session.config.evaluation, session.config.rollout
    return Sampling(
        max_tokens=settings.max_tokens or rollout.max_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        stop_token_ids=rollout.stop_token_ids,
        seed=hash_seed("evaluation", session.config.seed),
    )


def outputs_of(
    session: Session,
    requests: Sequence[Request],
    sampling: Sampling,
    entries: Entries | None = None,
    on_made: Callable[[Completion], None] | None = None,
) -> list[Output]:
    """This replica's answers, in one turn each or with the run's environment. What is played is not among `entries`.

    Collective. Raises as `play_outputs`.
    """
    if session.host is None:
        return [Output(one) for one in generate(session.inference, requests, sampling, entries, on_made)]
    assert session.data.held_out is not None
    prompts, k = session.data.held_out.prompts, session.config.evaluation.samples
    tasks = []
    for request in requests:
        assert request.seed is not None  # an evaluation's answers all have one
        environment_seed = hash_seed("environment", request.seed)
        tasks.append(Task(request.index, prompts[request.index // k], environment_seed, request.seed))
    return play_outputs(session, tasks, sampling, session.evaluation_grading, session.inference.work(len(tasks)))


def begin_grading(session: Session) -> None:
    """Have the reward's bounds per step start anew."""
    if session.evaluation_grading is not None:
        session.evaluation_grading.scoring.begin_step()


class GradedTogether(NamedTuple):
    """This rank's outputs with their grades, none where another rank of its replica grades; what was counted and
    failed first on all ranks."""

    graded: list[Graded]
    counters: dict[str, int]
    first_failure: str | None


def grade(session: Session, prompts: Sequence[Prompt], outputs: Sequence[Output]) -> GradedTogether:
    """Find the rewards of this rank's outputs, one prompt each, by the evaluation's rule. Collective.

    Raises `TrainingStopped` on all ranks where rewards cannot be found any more.
    """
    grading = session.evaluation_grading
    graded: list[Graded] = []
    failed = failure = None
    counters: Counter[str] = Counter()
    if grading is not None:
        try:
            graded = grading.grade(prompts, outputs)
            for one in graded:
                counters.update(one.counters)
        except ScoringStopped as error:
            failure = str(error)
        counters.update(grading.scoring.take_counters())
        failed = grading.scoring.take_first_failure()
    parts = gather_all((counters, failed, failure))
    for *_, stopped in parts:
        if stopped:
            raise TrainingStopped(stopped)
    first = next((failed for _, failed, _ in parts if failed), None)
    session.recorder.failure(first)
    return GradedTogether(graded, dict(sum((counted for counted, *_ in parts), Counter())), first)


def _numbers(session: Session, outputs: list[Output], prefix: str, detail: str, rows: list[_Row]) -> dict[str, Any]:
    """Means over all ranks' outputs: accuracy under `prefix`, the others under `detail`.

    This rank's answers are added to `rows`.
    """
    config, data = session.config, session.data.held_out
    assert data is not None
    prompts = [data.prompts[one.completion.index // config.evaluation.samples] for one in outputs]
    found = grade(session, prompts, outputs)
    rows += _rows(session, outputs, found.graded, consumer=bool(prefix))
    mine = [
        (o.completion.index, g.reward, g.terms, len(o.completion.token_ids), o.completion.finish_reason == "length")
        for o, g in zip(outputs, found.graded, strict=False)
    ]
    parts = gather_all(mine)
    answers = sorted((answer for part in parts for answer in part), key=lambda answer: answer[0])
    settings = config.evaluation.reward or config.reward
    rewards = [reward for _, reward, *_ in answers if reward is not None]
    numbers: dict[str, Any] = {
        f"{prefix}accuracy": above_middle(rewards, settings),
        f"{detail}reward_mean": sum(rewards) / len(rewards) if rewards else None,
        f"{detail}truncated_share": sum(cut for *_, cut in answers) / len(answers),
        f"{detail}length_mean": sum(length for *_, length, _ in answers) / len(answers),
        f"{detail}unscored": len(answers) - len(rewards),
        f"{detail}counters": found.counters,
    }
    if terms := term_means(terms for _, _, terms, *_ in answers):
        numbers[f"{detail}reward_terms"] = terms
    if found.first_failure is not None:
        numbers[f"{detail}reward_failure"] = found.first_failure
    if data.source_names:
        k = config.evaluation.samples
        sources = [(data.prompts[index // k].source, reward) for index, reward, *_ in answers]
        numbers |= by_source(sources, settings, prefix, detail)
    return numbers


def _rows(session: Session, outputs: Sequence[Output], graded: Sequence[Graded], *, consumer: bool) -> list[_Row]:
    """The lines of graded answers by the policy, or the consumer, in the file of an evaluation."""
    config, data = session.config, session.data.held_out
    assert data is not None
    settings = config.evaluation.reward or config.reward
    found = []
    # Of a replica one rank grades.
    for output, one in zip(outputs if graded else (), graded, strict=True):
        number, sample = divmod(output.completion.index, config.evaluation.samples)
        prompt = data.prompts[number]
        by = {"by": "consumer" if consumer else "policy"}
        row = answer_row(session, prompt, sample, output, one, settings)
        found.append(((consumer, output.completion.index), by | row))
    return found


def answer_row(
    session: Session, prompt: Prompt, sample: int, output: Output, graded: Graded, settings: RewardSettings
) -> dict[str, Any]:
    """The line of one graded answer in a file of answers; `settings` are those of its reward."""
    row: dict[str, Any] = {
        "prompt_index": prompt.index,
        "sample_index": sample,
        "source": prompt.source,
        "prompt": prompt.text,
        "answer": prompt.answer,
        "response": graded.text,
        "reward": graded.reward,
        "right": None if graded.reward is None else bool(above_middle([graded.reward], settings)),
        "length": len(output.completion.token_ids),
        "finish_reason": output.completion.finish_reason,
    }
    if graded.why is not None:
        row |= {"found": graded.found, "why": graded.why}
    if graded.terms:
        row["reward_terms"] = graded.terms
    if output.played is not None:
        ids, parts = output.completion.token_ids, output.stretches
        row["turns"] = turn_rows(parts, [session.tokenizer.decode(ids[part.start : part.end]) for part in parts])
    return row


def _keep(session: Session, name: str, rows: list[_Row]) -> None:
    """Have all ranks' `rows` recorded in the order of the problems, where they are to be kept. Collective."""
    if session.config.evaluation.save:
        parts = gather_to_first(rows)
        found = sorted((row for part in parts for row in part), key=lambda row: row[0])
        session.recorder.answers(name, [row for _, row in found])
