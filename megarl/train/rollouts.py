"""The rollout half of a step: prompts in, graded groups out.

A replica's first rank keeps the tokens of the samples its engine made. All ranks get the metadata
(rewards, lengths, who holds what), which is all that advantages and selection need.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from megarl.algorithms.base import GroupOutcome
from megarl.config.schema import RunConfig
from megarl.errors import Refusal
from megarl.parallel.cpu_platform import has_cuda
from megarl.parallel.exchange import gather_all
from megarl.records import Prompt, Sample
from megarl.rewards.grader import Grader, GradingItem
from megarl.rollout.engine import Completion, Engine, Request, Sampling
from megarl.rollout.seeds import batch_seed, sample_seed
from megarl.train import replay
from megarl.train.session import Session


@dataclass(frozen=True, slots=True)
class Score:
    """What all ranks know of a sample."""

    reward: float
    length: int
    finished: bool
    holder: int


@dataclass(slots=True)
class Rollouts:
    """The groups of a step. Request g·G+k is sample k of group g.

    `scores` has every request, on all ranks; `mine` the samples this rank holds; `shown` the first few
    samples with their texts, on all ranks; `kept` the groups to train on.
    """

    group_size: int
    prompts: list[Prompt] = field(default_factory=list)
    scores: dict[int, Score] = field(default_factory=dict)
    mine: dict[int, Sample] = field(default_factory=dict)
    shown: list[Sample] = field(default_factory=list)
    counters: dict[str, int] = field(default_factory=dict)
    kept: list[int] = field(default_factory=list)

    def outcome(self, group: int) -> GroupOutcome:
        """A group's metadata, in sample order."""
        scores = [self.scores[group * self.group_size + k] for k in range(self.group_size)]
        return GroupOutcome(
            tuple(s.reward for s in scores), tuple(s.length for s in scores), tuple(s.finished for s in scores)
        )

    def count(self, name: str, amount: int = 1) -> None:
        """Add to a counter of the step."""
        if amount:
            self.counters[name] = self.counters.get(name, 0) + amount


def make_rollouts(session: Session, step: int) -> Rollouts:
    """Generate and grade until there are enough groups to train on, or the algorithm's bound is reached.

    Collective. The engine must be awake unless the rollouts are replayed.
    """
    wanted = session.config.batch.prompts
    rollouts = Rollouts(session.config.rollout.group_size)
    for batch in range(session.algorithm.needs.max_generation_batches):
        first = len(rollouts.prompts)
        rollouts.prompts += [session.data.prompts[i] for i in session.stream.take(wanted)]
        _sample_batch(session, rollouts, step, batch, first)
        for group in range(first, len(rollouts.prompts)):
            if session.algorithm.keep(rollouts.outcome(group)):
                rollouts.kept.append(group)
            else:
                rollouts.count("groups_dropped")
        if len(rollouts.kept) >= wanted:
            break
    rollouts.count("groups_surplus", max(0, len(rollouts.kept) - wanted))
    del rollouts.kept[wanted:]
    return rollouts


def _sample_batch(session: Session, rollouts: Rollouts, step: int, batch: int, first: int) -> None:
    """Generate the groups from `first` on, grade what this rank holds, and tell everyone."""
    config, group_size = session.config, rollouts.group_size
    requests = [
        Request(rollouts.prompts[g].token_ids, g * group_size + k, _seed(session, step, rollouts.prompts[g].index, k))
        for g in range(first, len(rollouts.prompts))
        for k in range(group_size)
    ]
    if config.rollout.replay is not None:
        with session.clock.phase("replay"):
            samples = replay.read_samples(
                config.rollout.replay, step, rollouts.prompts, requests, session.world, group_size
            )
    else:
        assert session.engine is not None
        with session.clock.phase("generate"):
            completions = generate(session.engine, requests, _sampling(session, step, batch), config)
        samples = {}
        if session.grader is not None:
            prompts = [rollouts.prompts[c.index // group_size] for c in completions]
            with session.clock.phase("score"):
                graded = grade(session, session.grader, prompts, completions)
            samples = {
                c.index: _sample(c, s, request.seed, prompt, group_size)
                for c, s, prompt, request in zip(
                    completions, graded, prompts, _in_order(requests, completions), strict=True
                )
            }
    rollouts.mine |= samples
    with session.clock.phase("score"):
        _tell_everyone(session, rollouts, samples, {r.index for r in requests})


def generate(engine: Engine, requests: list[Request], sampling: Sampling, config: RunConfig) -> list[Completion]:
    """This replica's completions; fixed or drawn work by `rollout.deterministic`."""
    deterministic = config.rollout.deterministic
    fixed = not has_cuda() if deterministic is None else deterministic
    work = engine.fixed_assignment(len(requests)) if fixed else engine.shared_counter(len(requests))
    return engine.generate(requests, sampling, work)


@dataclass(frozen=True, slots=True)
class Graded:
    """A response as text, its reward, and the counter it raised, if any."""

    text: str
    reward: float
    counter: str | None


def grade(session: Session, grader: Grader, prompts: list[Prompt], completions: list[Completion]) -> list[Graded]:
    """Decode and grade completions, one prompt each."""
    settings = session.config.reward
    texts = [session.tokenizer.decode(c.token_ids) for c in completions]
    answers = grader.grade([GradingItem.of(p, text) for p, text in zip(prompts, texts, strict=True)])
    cut = settings.truncated == "zero"
    return [
        Graded(text, settings.low if cut and c.finish_reason == "length" else answer.reward, answer.counter)
        for text, c, answer in zip(texts, completions, answers, strict=True)
    ]


def _sample(completion: Completion, graded: Graded, seed: int | None, prompt: Prompt, group_size: int) -> Sample:
    return Sample(
        prompt_index=prompt.index,
        sample_index=completion.index % group_size,
        token_ids=completion.token_ids,
        rollout_log_probs=completion.log_probs,
        finish_reason=completion.finish_reason,
        seed=seed or 0,
        text=graded.text,
        reward=graded.reward,
        reward_counters={graded.counter: 1} if graded.counter else {},
    )


def _tell_everyone(session: Session, rollouts: Rollouts, samples: dict[int, Sample], expected: set[int]) -> None:
    """Exchange metadata, and the texts of the samples that are to be shown."""
    shown = session.config.logging.samples
    rank = session.world.rank
    scores = {i: Score(s.reward, len(s.token_ids), s.finish_reason == "stop", rank) for i, s in samples.items()}
    texts = {i: dataclasses.replace(s, rollout_log_probs=(), token_ids=()) for i, s in samples.items() if i < shown}
    counters: dict[str, int] = {}
    for sample in samples.values():
        for name, amount in sample.reward_counters.items():
            counters[name] = counters.get(name, 0) + amount
    to_show: dict[int, Sample] = {}
    for other_scores, other_texts, other_counters in gather_all((scores, texts, counters)):
        rollouts.scores |= other_scores
        to_show |= other_texts
        for name, amount in other_counters.items():
            rollouts.count(name, amount)
    missing = expected - rollouts.scores.keys()
    if missing:
        raise Refusal(
            f"{len(missing)} of {len(expected)} samples of this step",
            "must be there before a step can train on them",
            "replay a step that was saved whole",
        )
    rollouts.shown += [to_show[i] for i in sorted(to_show)]


def _in_order(requests: list[Request], completions: list[Completion]) -> list[Request]:
    by_index = {request.index: request for request in requests}
    return [by_index[c.index] for c in completions]


def _seed(session: Session, step: int, prompt_index: int, sample_index: int) -> int | None:
    seeded = session.config.rollout.seeded
    if seeded is None:
        seeded = not has_cuda()
    return sample_seed(session.config.seed, step, prompt_index, sample_index) if seeded else None


def _sampling(session: Session, step: int, batch: int) -> Sampling:
    settings = session.config.rollout
    return Sampling(
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        stop_token_ids=settings.stop_token_ids,
        seed=batch_seed(session.config.seed, step, batch),
    )
