"""What an algorithm asks of a step before anything is learned: texts to generate, and numbers to measure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from megarl.config.influence import InfluenceSettings
from megarl.config.parameter_sets import POLICY
from megarl.records import DEMONSTRATION, SOLUTION, Key, Prompt, Trajectory
from megarl.records import Sequence as TrainingSequence


@dataclass(frozen=True)
class Responder:
    """An output in two parts: it is begun up to the end of its thinking, and `responses` answers are written to that by
    the parameter set `weights`.

    The output's reward is the mean of its responses' rewards; the first response stands in it.
    """

    weights: str = POLICY
    responses: int = 1


@dataclass(frozen=True)
class Text:
    """What is learned after a prompt, the end token included; `marks` as in `megarl.records.Head`."""

    token_ids: tuple[int, ...]
    marks: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Learned:
    """What became of something that was generated: a text to learn, or None; and what is counted of it, by name."""

    text: Text | None
    counters: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Generation:
    """Texts that the engine writes to every prompt that is drawn, `count` of them, called `kind`.

    All callables see one prompt at a time, on the rank that needs it, and depend on nothing but their arguments.
    """

    count: int
    kind: str = "answer"
    weights: str = POLICY
    """The parameter set that writes. What another than the policy writes is the same whenever a prompt returns."""
    responder: Responder | None = None
    """Who writes the part after the thinking, where that is generated apart."""
    prompt: Callable[[Prompt], Sequence[int] | str] | None = None
    """Ids that the engine is given in place of the prompt's own, or the name of a counter where it is given none."""
    max_tokens: int | None = None
    """A bound of its own, in place of rollout.max_tokens."""
    graded: bool = True
    """Whether the run's reward is found for it."""
    needs_reward: bool = True
    """Whether a group is left out of the step where one of them has no reward, though it was asked for."""
    learn: Callable[[Prompt, Trajectory], Learned] | None = None
    """Where not the sample itself is trained, but a text that is made of it: what that is. The text follows the prompt
    as the data set has it, and is trained without a reward."""
    refresh_every: int = 1
    """A prompt's texts are used again when it returns within that many steps; 1: they are made anew each time."""


@dataclass(frozen=True)
class Plan:
    """What a step generates, in this order, and learns from besides.

    Raises:
        ValueError: two generations of one kind, or one of the kind of worked solutions or demonstrations.
    """

    generations: tuple[Generation, ...] = ()
    batches: int = 1
    """Bound on generation batches, while groups are dropped; then the step trains on what it has."""
    solutions: bool = False
    """The data set's worked solutions are learned, as texts of the kind "solution"."""
    demonstrations: int = 0
    """So many of the demonstrations' data set are learned whole, as texts of the kind "demonstration", in groups of
    their own, of which neither `drop_reason` nor `credit` is asked."""
    gauged: int = 0
    """Of so many kept groups, the first ones, `Algorithm.gauges` is asked for."""
    prompts: int | None = None
    """Groups that are wanted to train on, in place of batch.prompts."""
    grows: bool = False
    """`Algorithm.growth` is asked of the kept groups, and they are trained with the continuations that it wants."""

    def __post_init__(self) -> None:
        kinds = [one.kind for one in self.generations]
        own = {SOLUTION, DEMONSTRATION}
        if len(set(kinds)) < len(kinds) or own & set(kinds):
            raise ValueError(
                f"kinds {kinds} of a plan's generations must differ, also from {SOLUTION!r} and {DEMONSTRATION!r}"
            )


class Fork(NamedTuple):
    """`count` continuations of the trajectory `parent`, each after its first `place` tokens."""

    parent: Key
    place: int
    count: int


@dataclass(frozen=True)
class Growth:
    """How a kept group goes on: its forks, one after the other; nothing of it where it is `left_out`, the name of a
    counter that says why. `counters`: what is counted of it besides."""

    forks: tuple[Fork, ...] = ()
    left_out: str | None = None
    counters: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Influence:
    """How much the later steps of a sample look at each of its steps: see `megarl.policy.influence`.

    `steps` says where these begin, in the sequence, the first at its first position; what is before is a step too.
    """

    steps: Callable[[TrainingSequence], Sequence[int]]
    settings: InfluenceSettings


@dataclass(frozen=True)
class Probe:
    """A measurement of the kept groups' samples of one kind, made before growth and credit.

    Numbers of a sample under the parameter set `parameters`, which may be one that somebody serves, are reduced to a
    few on the rank that finds them; every rank then has these as `Head.measured[name]`, since credit is given to all
    groups at once. A number costs some 40 bytes on every rank: one
    per token of 10,000 answers of 1,000 tokens would be 400 MB. So there may be `most` of a sample, such as one per
    step of its reasoning; more is refused. What a loss alone needs per token is better read there, by
    `Objective.under`, as it then stays on the ranks that train on the sample.

    A sample without a token of its own has no number. A group is dropped, and counted as `groups_unmeasured`, where a
    server gives no log-probs of one of its samples.
    """

    name: str
    reduce: Callable[[np.ndarray, TrainingSequence], Sequence[float]]
    """The few numbers, from what is measured of the sample's own tokens (T,), those at the sequence's positions, or of
    their steps (S,)."""
    parameters: str = POLICY
    kind: str = "answer"
    most: int = 64
    """The most numbers of a sample. Our choice."""
    measures: Literal["log_probs", "entropy"] | Influence = "log_probs"
    """Log-probs in nats; the entropy in nats of the distribution that each token is of; or an influence. The latter two
    are measured under the policy's own weights alone."""


@dataclass(frozen=True)
class Gauge:
    """A text whose likelihood after a prompt is logged: `parts` by the metric's name, as (start, end) in `token_ids`.

    A metric whose name ends in "_nll" is a negative log-likelihood per token, any other the log-likelihood of a text;
    nats, in the mean over the step's gauges that have it. `common`: it is made of what all ranks know.
    """

    token_ids: tuple[int, ...]
    parts: Mapping[str, tuple[int, int]]
    common: bool = False
