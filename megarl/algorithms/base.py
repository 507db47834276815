"""What an algorithm is to the training loop.

The loop asks it, in this order per step:

    plan -> (texts are made and graded) -> drop_reason -> probes -> (measured) -> credit -> objectives

and where the plan grows, growth -> (continuations are made and graded) before credit. All work on what every rank
knows, whole groups, `growth` and `credit` on all of a step's, so every rank computes the same and no algorithm contains
parallel code. What a step is asked for: `megarl.algorithms.plan`; the losses:
`megarl.algorithms.objective`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from megarl.algorithms.objective import Objective
from megarl.algorithms.plan import Gauge, Growth, Plan, Probe
from megarl.config.algorithms import AlgorithmSettings
from megarl.config.data import DataSettings
from megarl.config.implied import Implied
from megarl.config.model_shape import ModelShape
from megarl.config.rewards import RULE_KINDS
from megarl.config.schema import RunConfig
from megarl.data.thinking import ThinkingEnd
from megarl.data.tokenizer import Tokenizer
from megarl.errors import Refusal
from megarl.records import NEVER_TRAINED, Head, Prompt, Trajectory


@dataclass(frozen=True)
class AlgorithmContext:
    """Facts of the run that an algorithm may need."""

    max_tokens: int
    """rollout.max_tokens: longest response in tokens."""
    group_size: int = 1
    """rollout.group_size: samples per prompt."""
    prompts: int = 0
    """batch.prompts: prompts of a step."""
    ahead: int = 0
    """rollout.ahead: how many steps before they are learned from groups are begun."""
    steps: int = 0
    """Steps of the run; 0 where epochs are given in their place."""
    demonstrations: int = 0
    """Demonstrations that a step learns."""
    reward_low: float = 0.0
    """The least reward: reward.low, of a sum what its terms' add up to."""
    reward_high: float = 1.0
    """The greatest reward."""
    reward_judges: bool = False
    """Whether the reward says right or wrong, and costs nothing to ask."""
    tokenizer: Tokenizer | None = None
    data: DataSettings | None = None
    """How questions are put to the model; with the tokenizer, for texts of the algorithm's own."""
    thinking_end: ThinkingEnd | None = None
    """What ends the thinking of a response."""
    seed: int = 0
    """Of the run, for what the algorithm draws."""
    stop_ids: frozenset[int] = frozenset()
    """Token ids that end a response."""

    @classmethod
    def of(cls, config: RunConfig, shape: ModelShape, tokenizer: Tokenizer) -> AlgorithmContext:
        """The facts of a run."""
        low, high = config.reward.bounds
        return cls(
            max_tokens=config.rollout.max_tokens,
            group_size=config.rollout.group_size,
            prompts=config.batch.prompts,
            ahead=config.rollout.ahead,
            steps=config.steps,
            demonstrations=Implied(config).demonstrations,
            reward_low=low,
            reward_high=high,
            reward_judges=config.reward.kind in RULE_KINDS,
            tokenizer=tokenizer,
            data=config.data,
            thinking_end=ThinkingEnd(tokenizer, config.rollout.thinking_end),
            seed=config.seed,
            stop_ids=frozenset((tokenizer.eos_token_id, *shape.eos_token_ids, *config.rollout.stop_token_ids)),
        )


@dataclass(frozen=True)
class Group:
    """A prompt that was drawn, and what all ranks know of what was made for it; the `number`-th of the step."""

    number: int
    prompt: Prompt
    draw: int
    """How often the prompt had been drawn before in the step."""
    heads: tuple[Head, ...] = ()
    """By kind in the order of the plan, and in order within."""

    def of(self, kind: str) -> tuple[Head, ...]:
        """The heads of one kind."""
        return tuple(head for head in self.heads if head.key.kind == kind)

    @property
    def answers(self) -> tuple[Head, ...]:
        """The heads of the kind "answer"."""
        return self.of("answer")

    @property
    def rewards(self) -> tuple[float, ...]:
        """Those of the answers, all of which must have one.

        Raises:
            Refusal: a reward is not finite, or there is no answer.
        """
        rewards = tuple(head.reward for head in self.answers)
        if not rewards:
            raise Refusal("a group without answers", "has no rewards", "plan a generation of the kind answer")
        for index, reward in enumerate(rewards):
            if reward is None or not math.isfinite(reward):
                raise Refusal(f"reward {reward} of sample {index}", "must be finite", "correct the reward function")
        return tuple(reward for reward in rewards if reward is not None)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Response tokens of the answers, the end token included."""
        return tuple(head.length for head in self.answers)


class Span(NamedTuple):
    """Tokens `start` to `end` of a response that are trained, all with one advantage; NaN: they have none."""

    start: int
    end: int
    advantage: float = math.nan


@dataclass(frozen=True)
class Trained:
    """What of a trajectory is trained.

    `spans` are in order and apart; those kept are without the tokens of environments and hints, whatever is given.
    Tokens before and between them are context, those after the last are not even computed. `signals` are further
    numbers that the losses find in `LossInputs.signals_S`, by name, the same names in every group.

    Raises:
        ValueError: spans out of order, that overlap, or beyond the response.
    """

    head: Head
    spans: tuple[Span, ...]
    signals: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        places = [place for span in self.spans for place in span[:2]]
        if places != sorted(places) or (places and not 0 <= places[0] <= places[-1] <= self.head.length):
            raise ValueError(
                f"spans {self.spans} of {self.head.length} tokens must be in order, apart, and within them"
            )
        object.__setattr__(self, "spans", _learnable(self.head, self.spans))

    @property
    def tokens(self) -> int:
        """Number of tokens trained."""
        return sum(span.end - span.start for span in self.spans)


@dataclass(frozen=True)
class Credit:
    """What of a group is trained; nothing where it is `left_out`, the name of a counter that says why. `counters`: what
    is counted of it besides.

    Raises:
        ValueError: a trajectory is there twice: its spans belong together.
    """

    trained: tuple[Trained, ...]
    left_out: str | None = None
    counters: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        keys = [one.head.key for one in self.trained]
        if len(set(keys)) < len(keys):
            raise ValueError("a trajectory is credited twice: give its spans in one Trained")


class Algorithm(ABC):
    """One algorithm: a file beside this one and a row in `megarl.algorithms.ALGORITHMS`."""

    Settings: ClassVar[type[AlgorithmSettings]]
    #: Whether outputs are one thinking and a response each, whose border is marked as "thinking".
    splits_thinking: ClassVar[bool] = False
    objectives: tuple[Objective, ...]
    """What is trained: the loss of a pass is the sum of those of its objectives."""

    @abstractmethod
    def __init__(self, settings: Any, context: AlgorithmContext) -> None:
        """Set `objectives`.

        Args:
            settings: an instance of the class's `Settings`.
            context: facts of the run.

        Raises:
            Refusal: settings that do not fit each other or the run.
        """

    @abstractmethod
    def plan(self, step: int) -> Plan:
        """What step `step` (1, 2, ...) generates and learns from.

        Depends on nothing but settings, step and declared state. It may name only parameter sets that the settings
        declare (`AlgorithmSettings.parameter_sets`).
        """

    def drop_reason(self, group: Group) -> str | None:
        """Why not to train on the group, by its rewards; None to train on it, the default.

        Further prompts take the place of dropped ones, up to `Plan.batches`. The reason is the name of a counter, such
        as "groups_without_variance".
        """
        return None

    def probes(self, step: int) -> tuple[Probe, ...]:
        """What to measure of the kept groups before `growth` and `credit`; by default nothing."""
        return ()

    def growth(self, step: int, groups: Sequence[Group]) -> list[Growth]:
        """Which trajectories of each of the kept groups are gone on with, and from where; asked where `Plan.grows`.

        The continuations are further heads of the group, of their parents' kind, and `Head.fork` says where they leave
        these. `step` is the one that began the groups: under `rollout.ahead` they grow and are trained in the next.
        """
        return [Growth() for _ in groups]

    @abstractmethod
    def credit(self, step: int, groups: Sequence[Group]) -> list[Credit]:
        """What of each of the step's kept groups is trained, and with which advantages."""

    def objectives_of(self, step: int) -> tuple[Objective, ...]:
        """The objectives of step `step`: `objectives`, unless factors in their `goes_to` change from step to step;
        nothing else may."""
        return self.objectives

    def numbers(self, losses: Mapping[str, float]) -> dict[str, float]:
        """Further numbers to log of a step, made of the losses of its passes (`Objective.in_pass`) in the mean over
        its updates; by default none."""
        return {}

    def gauges(self, group: Group, held: Sequence[Trajectory]) -> list[Gauge]:
        """Texts whose likelihood is to be logged, of a kept group; by default none.

        `held` are those of the group's trajectories that this rank answers for: every rank says what it has. What is
        made of `group` alone, every rank says, as `Gauge.common`. Asked for where `Plan.gauged` says so.
        """
        return []

    def state(self) -> dict[str, Any]:
        """What the algorithm has learned of the run that later steps depend on, saved in every checkpoint; by default
        nothing. Of JSON's types, keys being text, and a value of its own that later steps do not change."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:  # noqa: B027 (an algorithm without state has nothing to do)
        """Go on from what `state` had returned."""


def _learnable(head: Head, spans: Sequence[Span]) -> tuple[Span, ...]:
    """What of `spans` lies in stretches whose tokens may be trained; without empty spans."""
    sources = [stretch for stretch in head.stretches if stretch.source not in NEVER_TRAINED]
    cut = (
        Span(max(span.start, stretch.start), min(span.end, stretch.end), span.advantage)
        for span in spans
        for stretch in sources
    )
    return tuple(span for span in cut if span.start < span.end)


def whole(head: Head, advantage: float = math.nan) -> tuple[Span, ...]:
    """The span of a whole response."""
    return (Span(0, head.length, advantage),) if head.length else ()
