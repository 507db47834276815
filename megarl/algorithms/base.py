"""What an algorithm is to the training loop.

The loop provides what `needs` asks for, in this order per step:

    begin_step -> rollouts -> drop_reason (on the rewards as scored) -> shape_rewards -> advantages, signals, spans
               (on the shaped rewards) -> batch_advantages -> old / reference log-probs -> loss per micro-batch

All but the last work on whole groups, batch_advantages on all groups of the step, from metadata that every rank has, so
every rank computes the same and no algorithm contains parallel code. The losses: `megarl.algorithms.objective`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from megarl.algorithms.objective import LossInputs, LossTerms
from megarl.config.algorithms import AlgorithmSettings, ExplanationSettings
from megarl.errors import Refusal

#: Whose weights generate: those of the policy as it is, or as it was when the run began.
Weights = Literal["current", "initial"]


@dataclass(frozen=True)
class Responder:
    """Rollouts in two parts: the policy thinks, then `responses` answers are written to each thinking by `weights`.

    A sample's reward is the mean of its responses' rewards; the first response stands in the sample.
    """

    weights: Weights
    responses: int = 1


@dataclass(frozen=True)
class Needs:
    """What the loop must provide for an algorithm that generates; the first three also for one that does not."""

    old_log_probs: bool = False
    """Log-probs under the weights the rollouts were made with, recomputed by the policy."""
    reference_log_probs: bool = False
    """Log-probs under the weights the run began with."""
    entropy_gradient: bool = False
    """`entropy_T` must carry a gradient; otherwise it may be computed without."""
    max_generation_batches: int = 1
    """Bound on generation batches per step while groups are dropped; then the step trains on what it has."""
    thinking: bool = False
    """`GroupOutcome.thinking_lengths`: where the thinking of each sample ends."""
    responder: Responder | None = None
    """Generate in two parts; needs `thinking`."""
    explanations: ExplanationSettings | None = None
    """Generate explanations of the reference answers beside the rollouts: the targets of `LossInputs`."""
    pairs: bool = False
    """The trained samples and the targets of a group share a micro-batch; groups that lack either are left out."""
    rollout_weights: Weights = "current"
    """Whose weights generate the rollouts. Those of "initial" are the same whenever a prompt returns."""


@dataclass(frozen=True)
class AlgorithmContext:
    """Facts of the run that an algorithm may need."""

    max_tokens: int
    """rollout.max_tokens: longest response in tokens."""
    group_size: int = 1
    """rollout.group_size: samples per prompt."""
    reward_low: float = 0.0
    """The least reward: reward.low, of a sum what its terms' add up to."""


@dataclass(frozen=True)
class GroupOutcome:
    """How the samples of one prompt ended: metadata, the same on all ranks; one entry per sample, in sample order.

    Raises:
        Refusal: the entries differ in number, there are none, or a reward is not finite.
    """

    rewards: tuple[float, ...]
    lengths: tuple[int, ...]
    """Response tokens, the end token included."""
    finished: tuple[bool, ...]
    """False where the response was cut at rollout.max_tokens."""
    thinking_lengths: tuple[int | None, ...] | None = None
    """Tokens up to and including the end of the thinking; None for a sample that is not one thinking, which is not
    empty, and a response. Known where `Needs.thinking` asks for it."""

    def __post_init__(self) -> None:
        counts = {len(self.rewards), len(self.lengths), len(self.finished)}
        if self.thinking_lengths is not None:
            counts.add(len(self.thinking_lengths))
        if len(counts) != 1 or 0 in counts:
            raise Refusal(
                f"a group with {len(self.rewards)} rewards, {len(self.lengths)} lengths, {len(self.finished)} ends",
                "needs the same number of each, at least 1",
                "pass one entry per sample",
            )
        for index, reward in enumerate(self.rewards):
            if not math.isfinite(reward):
                raise Refusal(f"reward {reward} of sample {index}", "must be finite", "correct the reward function")


class Algorithm(ABC):
    """One algorithm: a file beside this one and a row in `megarl.algorithms.ALGORITHMS`."""

    Settings: ClassVar[type[AlgorithmSettings]]
    needs: Needs

    @abstractmethod
    def __init__(self, settings: Any, context: AlgorithmContext) -> None:
        """Set `needs`.

        Args:
            settings: an instance of the class's `Settings`.
            context: facts of the run.

        Raises:
            Refusal: settings that do not fit each other or the run.
        """

    def begin_step(self, step: int) -> None:  # noqa: B027 (an algorithm without stages has nothing to do)
        """Called before step `step` (1, 2, ...), also when a run continues there; may change `needs`.

        What the algorithm does then depends on nothing but its settings and `step`. The first `needs`, after
        construction, are those of which the run is built: later ones may only ask for less.
        """

    def shape_rewards(self, outcome: GroupOutcome) -> tuple[float, ...]:
        """The rewards that the following shall see, one per sample; by default those of the outcome."""
        return outcome.rewards

    def drop_reason(self, outcome: GroupOutcome) -> str | None:
        """Why not to train on the group, by its rewards as scored (not shaped); None to train on it, the default.

        Further prompts take the place of dropped ones, up to `Needs.max_generation_batches`. The reason is the name of
        a counter, such as "groups_without_variance".
        """
        return None

    def advantages(self, outcome: GroupOutcome) -> tuple[float, ...]:
        """One advantage per sample, for all its tokens; `outcome` is the whole group with shaped rewards.

        By default the rewards themselves.
        """
        return outcome.rewards

    def batch_advantages(self, advantages: tuple[float, ...], tokens: tuple[int, ...]) -> tuple[float, ...]:
        """The advantages of all samples that the step trains on, seen together; by default as they are.

        `tokens` has the number of trained tokens, at least 1, of each sample.
        """
        return advantages

    def signals(self, outcome: GroupOutcome) -> dict[str, tuple[float, ...]]:
        """Further numbers per sample that `loss` finds in `LossInputs.signals_S`, by name; by default none.

        `outcome` is the whole group with shaped rewards. Every group has the same names.
        """
        return {}

    def spans(self, outcome: GroupOutcome) -> tuple[tuple[int, int], ...]:
        """Which tokens of each sample are trained, as (start, end) within the response; by default all.

        Tokens before `start` are context, those from `end` on are not even computed; an empty span leaves the
        sample out.
        """
        return tuple((0, length) for length in outcome.lengths)

    def state(self) -> dict[str, Any]:
        """What the algorithm has learned of the run that later steps depend on, saved in every checkpoint; by default
        nothing. Of JSON's types, keys being text, and a value of its own that later steps do not change."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:  # noqa: B027 (an algorithm without state has nothing to do)
        """Go on from what `state` had returned."""

    @abstractmethod
    def loss(self, inputs: LossInputs) -> LossTerms:
        """The micro-batch's share of the loss, from its own sequences alone: no collective."""
