"""The numbers of one step, collected while it runs and written as one line of metrics.jsonl."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from megarl.algorithms.base import Group, Span
from megarl.config.parameter_sets import POLICY
from megarl.config.schema import RunConfig
from megarl.data.dataset import LoadedPrompts
from megarl.policy.losses import Pass
from megarl.policy.trained_set import StepResult
from megarl.records import Key
from megarl.train import shown, timeline
from megarl.train.groups import Made, Rollouts, added
from megarl.train.scoring import term_means
from megarl.train.session import Session
from megarl.train.sources import by_source, level_of


class StepRecord:
    """Collects a step's numbers; `write` completes and records them. All ranks call it alike."""

    def __init__(self, session: Session, step: int) -> None:
        self._session, self._step = session, step
        self._rollouts: Rollouts | None = None
        self._counters: dict[str, int] = {}
        self._groups = 0
        self._spans: Mapping[Key, tuple[Span, ...]] = {}
        self._passes: dict[str, list[Pass]] = {POLICY: []}
        self._steps: dict[str, list[StepResult]] = {POLICY: []}
        self._measured: dict[str, float] = {}

    def rollouts(self, rollouts: Rollouts) -> None:
        """Take the step's groups."""
        self._rollouts = rollouts
        self.count(rollouts.made.counters)
        self.count(rollouts.kept.counters)

    def credited(self, groups: int, counters: Mapping[str, int], spans: Mapping[Key, tuple[Span, ...]]) -> None:
        """Take how many groups the algorithm has given credit, what was counted of them, and what is trained."""
        self._groups, self._spans = groups, spans
        self.count(counters)

    def count(self, counters: Mapping[str, int]) -> None:
        """Take what was counted in the step."""
        self._counters = added(self._counters, counters)
        for name, amount in counters.items():
            self._session.counters.count(name, amount)

    def add(self, values: dict[str, float]) -> None:
        """Take further numbers of the step."""
        self._measured |= values

    def update(self, passes: Mapping[str, Pass], steps: Mapping[str, StepResult]) -> None:
        """Take passes by their names, and the optimizer steps of parameter sets."""
        for name, found in passes.items():
            self._passes.setdefault(name, []).append(found)
        for name, step in steps.items():
            self._steps.setdefault(name, []).append(step)
        self._session.progress.skipped_updates += any(step.skipped for step in steps.values())

    def write(self) -> dict[str, Any]:
        """Complete the numbers, record them, and return them."""
        session = self._session
        values: dict[str, Any] = {"step": self._step, "epoch": round(session.data.stream.epoch, 6)}
        values["algorithm"] = session.config.algorithm.name
        put(values, of_updates(self._passes, self._steps))
        losses = {name: _mean([one.loss for one in made]) for name, made in self._passes.items() if made}
        put(values, session.algorithm.numbers(losses))
        put(values, _of_rollouts(self._rollouts, self._groups))
        put(values, _by_source(session.config, session.data.training, self._rollouts))
        put(values, _by_level(self._rollouts))
        put(values, staleness(self._rollouts.kept.groups if self._rollouts is not None else (), self._step))
        put(values, _of_turns(session.config, self._rollouts))
        put(values, self._measured)
        # Every rank waits for the slowest in each phase; rank 0's clock shows it.
        seconds = {name: round(seconds, 6) for name, seconds in session.clock.take().items()}
        passes = [found for several in self._passes.values() for found in several]
        made = self._rollouts.made if self._rollouts is not None else Made()
        put(values, {"seconds": seconds, "time_shares": time_shares(seconds, passes, made.generated_tokens)})
        memory, sentence = session.memory.take()
        put(values, memory)
        put(values, timeline.record(session, self._step, "step"))
        put(values, {"skipped_updates": session.progress.skipped_updates, "counters": self._counters})
        if made.reward_failure is not None:
            put(values, {"reward_failure": made.reward_failure})
        session.recorder.step(values)
        if sentence is not None:
            session.recorder.status(sentence)
        if self._rollouts is not None:
            session.recorder.samples(shown.rows_of(session, self._step, self._rollouts, self._spans))
        if self._step % session.config.logging.plot_every == 0:
            session.recorder.curves()
        return values


#: Names that every line has, None where the step has no such number.
_UPDATE_NAMES = (
    "loss",
    "grad_norm",
    "lr",
    "entropy",
    "clip_share",
    "logprob_gap_mean",
    "logprob_gap_max",
    "logprob_k3",
)


def of_updates(passes: Mapping[str, Sequence[Pass]], steps: Mapping[str, Sequence[StepResult]]) -> dict[str, Any]:
    """Means over the step's updates, None where there was none: the policy's own by their names, those of another
    pass or parameter set with its name and a slash before them."""
    values: dict[str, Any] = dict.fromkeys(_UPDATE_NAMES)
    for name in dict.fromkeys((*passes, *steps)):
        found = _of_steps(steps.get(name, ()))
        put(found, _of_passes(passes.get(name, ())))
        put(values, found if name == POLICY else {f"{name}/{key}": value for key, value in found.items()})
    made = [one for several in passes.values() for one in several]
    real, computed = sum(one.real_tokens for one in made), sum(one.computed_tokens for one in made)
    put(values, {"tokens": real, "padding_share": 1 - real / computed if made else 0.0})
    return values


def _of_passes(passes: Sequence[Pass]) -> dict[str, float | None]:
    """`grad_norm_SET` is that of the pass alone, where it is a part of what the set's step applies."""
    if not passes:
        return {}
    values: dict[str, float | None] = {"loss": _mean([one.loss for one in passes])}
    for name in dict.fromkeys(name for one in passes for name in one.means):
        put(values, {name: _mean([one.means[name] for one in passes if name in one.means])})
    for name in dict.fromkeys(name for one in passes for name in one.grad_norms):
        put(values, {f"grad_norm_{name}": _mean([one.grad_norms[name] for one in passes if name in one.grad_norms])})
    gaps = [one.gap_max for one in passes if "logprob_gap_mean" in one.means]
    put(values, {"logprob_gap_max": max(gaps, default=None)})
    return values


def _of_steps(steps: Sequence[StepResult]) -> dict[str, Any]:
    if not steps:
        return {}
    return {"grad_norm": _mean([one.grad_norm for one in steps]), "lr": steps[-1].lr}


def _mean(values: Sequence[float]) -> float:
    # As written, so that a run's numbers stay what they were: fmean rounds otherwise.
    return sum(values) / len(values)


def put(values: dict[str, Any], further: Mapping[str, Any]) -> None:
    """Add further numbers of a step to its `values`.

    Raises:
        ValueError: one of them has the name of another number, which would be lost.
    """
    for name, value in further.items():
        if values.get(name) is not None:
            raise ValueError(f"a step has two numbers called {name!r}: an algorithm must log its own by another name")
        values[name] = value


def _of_rollouts(rollouts: Rollouts | None, groups: int) -> dict[str, Any]:
    answers = [head for _, head in rollouts.made.answers] if rollouts is not None else []
    if rollouts is None or not answers:
        found: dict[str, Any] = dict.fromkeys(("reward_mean", "reward_std", "response_length_mean"))
        if rollouts is not None and rollouts.earlier is not None:
            # The last step of a run that is ahead: it asks nothing.
            tokens = sum(rollouts.made.generated_tokens.values())
            found |= {"generated_tokens": tokens, "groups_trained": groups} | _signal(rollouts.kept.groups)
        return found
    rewards = [head.reward for head in answers if head.reward is not None]
    terms = term_means(head.reward_terms for head in answers)
    return ({"reward_terms": terms} if terms else {}) | {
        "reward_mean": statistics.fmean(rewards) if rewards else None,
        "reward_std": statistics.pstdev(rewards) if rewards else None,
        "response_length_mean": statistics.fmean(head.length for head in answers),
        "truncated_share": statistics.fmean(not head.finished for head in answers),
        "generated_tokens": sum(rollouts.made.generated_tokens.values()) or sum(head.length for head in answers),
        "groups": len(rollouts.made.groups),
        "groups_trained": groups,
        **_signal(rollouts.kept.groups),
    }


def _signal(groups: Sequence[Group]) -> dict[str, float]:
    """The share of groups whose rewards are not all one."""
    rewards = [{head.reward for head in group.answers} - {None} for group in groups]
    return {"signal_share": statistics.fmean(len(one) > 1 for one in rewards)} if rewards else {}


def _of_turns(config: RunConfig, rollouts: Rollouts | None) -> dict[str, Any]:
    """Where an environment answers: the policy's turns per answer, the environment's share of their tokens, and all
    tokens that the engines have counted, of which `generated_tokens` are those that are in a text."""
    if rollouts is None or config.rollout.environment is None or not rollouts.made.answers:
        return {}
    heads = [head for _, head in rollouts.made.answers]
    environments = sum(one.end - one.start for head in heads for one in head.stretches if one.source == "environment")
    total = sum(head.length for head in heads)
    return {
        "turns_mean": statistics.fmean(sum(one.source != "environment" for one in head.stretches) for head in heads),
        "environment_token_share": environments / total if total else 0.0,
        "engine_tokens": rollouts.made.engine_tokens,
    }


def _by_source(config: RunConfig, data: LoadedPrompts, rollouts: Rollouts | None) -> dict[str, Any]:
    """The answers' numbers apart by source, where the data has several."""
    if rollouts is None or not rollouts.made.answers or not data.source_names:
        return {}
    answers = [(prompt.source, head.reward) for prompt, head in rollouts.made.answers]
    return by_source(answers, config.reward)


def _by_level(rollouts: Rollouts | None) -> dict[str, Any]:
    """The mean reward of the answers by their problems' level, where the data's extra columns have one."""
    found: dict[str, list[float]] = {}
    for prompt, head in rollouts.made.answers if rollouts is not None else ():
        level = level_of(prompt)
        if level is not None and head.reward is not None:
            found.setdefault(level, []).append(head.reward)
    means = {level: statistics.fmean(rewards) for level, rewards in sorted(found.items())}
    return {"reward_mean_by_level": means} if means else {}


def staleness(groups: Sequence[Group], step: int) -> dict[str, float]:
    """How many steps the weights that step `step` begins with have learned from since others wrote the tokens of the
    kept answers: the mean over these tokens, and the most; nothing where that is not known of any."""
    written = [
        (step - 1 - stretch.version, stretch.end - stretch.start)
        for group in groups
        for head in group.answers
        for stretch in head.stretches
        if stretch.source == "policy" and stretch.version is not None
    ]
    tokens = sum(count for _, count in written)
    if not tokens:
        return {}
    mean = sum(age * count for age, count in written) / tokens
    return {"staleness_mean": mean, "staleness_max": max(age for age, _ in written)}


def time_shares(seconds: Mapping[str, float], passes: Sequence[Pass], made: Mapping[str, int]) -> dict[str, float]:
    """Parts of the step's time: `loss`, that of the objectives' losses, and that of generating each kind of an
    algorithm's own texts, by the kind with an s. `made` are the generated tokens by kind.

    Such texts are generated in one call with the answers; their part of its time is their part of its tokens.
    """
    total = sum(seconds.values())
    shares = {"loss": sum(p.loss_seconds for p in passes) / total}
    for kind, tokens in made.items():
        if kind != "answer":
            shares[f"{kind}s"] = seconds.get("generate", 0.0) * tokens / sum(made.values()) / total
    return {name: round(share, 6) for name, share in shares.items()}
