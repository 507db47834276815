"""Outputs of several turns: which are played, within which bounds, and how good a turn was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megarl.algorithms.plan import Generation
from megarl.config.parameter_sets import POLICY
from megarl.environments.base import Verdict
from megarl.environments.verdicts import Said
from megarl.errors import ScoringStopped, TrainingStopped
from megarl.parallel.exchange import gather_all
from megarl.records import Stretch
from megarl.rollout.draw import WorkSource
from megarl.rollout.engine import Completion, Sampling
from megarl.rollout.play import Bounds, Played, Task, play
from megarl.train.outputs import Output
from megarl.train.scoring import Grading
from megarl.train.session import Session


def is_played(session: Session, generation: Generation) -> bool:
    """Whether the environment answers what is generated: answers that are written in one part."""
    return session.host is not None and generation.kind == "answer" and generation.responder is None


def play_outputs(
    session: Session,
    tasks: Sequence[Task],
    sampling: Sampling,
    grading: Grading | None,
    work: WorkSource,
    weights: str = POLICY,
) -> list[Output]:
    """This replica's samples, each with its environment; all of a sample is bounded by `sampling.max_tokens`.

    `grading` finds verdicts of turns for environments that want them. Collective. Raises `TrainingStopped` on all ranks
    where verdicts cannot be found any more, or environments not be started.
    """
    host, settings = session.host, session.config.rollout.environment
    assert host is not None and settings is not None
    bounds = Bounds(
        turns=settings.max_turns,
        tokens=sampling.max_tokens,
        prompt_tokens=session.config.data.max_prompt_tokens,
        turn_tokens=settings.max_turn_tokens,
        samples=settings.workers,
        in_order=settings.in_order,
    )
    sampling = replace(sampling, stop_token_ids=(*sampling.stop_token_ids, *host.stop_token_ids))
    played: list[Played] = []
    stopped = None
    with host.grading(lambda said: _verdicts(grading, said)):
        try:
            played = play(session.inference.running_engine, tasks, sampling, bounds, host.host, work)
        except ScoringStopped as error:
            stopped = str(error)
    told = gather_all((stopped, host.take_first_failure()))
    if stops := [stopped for stopped, _ in told if stopped]:
        raise TrainingStopped(stops[0])
    session.recorder.failure(next((failure for _, failure in told if failure), None), "environment")
    return [_output(one, weights) for one in played]


def _verdicts(grading: Grading | None, said: Sequence[Said]) -> list[Verdict]:
    """The run's reward of samples that end with what was said."""
    if grading is None:
        return [Verdict(None)] * len(said)
    outputs = [
        Output(Completion(i, one.turns[-1], (), one.finish_reason), turns=one.turns) for i, one in enumerate(said)
    ]
    graded = grading.grade([one.prompt for one in said], outputs)
    return [Verdict(one.reward, one.counters, one.terms) for one in graded]


def _output(played: Played, weights: str) -> Output:
    completion = Completion(
        played.index, played.token_ids, played.log_probs, played.finish_reason, played.routed_experts
    )
    stretches = tuple(_by(one, weights) for one in played.stretches)
    return Output(completion, stretches=stretches, turns=played.turns, played=played)


def _by(stretch: Stretch, weights: str) -> Stretch:
    """A stretch, with the policy's word for other weights of its model where these wrote it."""
    if weights == POLICY or stretch.source != "policy":
        return stretch
    return stretch._replace(source="other", version=None)
