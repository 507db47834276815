"""Objectives: what an algorithm trains, as pure losses of the flat tokens of one micro-batch.

A loss sees whole sequences under every layout, and the counts of the whole mini-batch are passed in: no collective. The
forward pass of a micro-batch is shared by all objectives of a pass; each sees the tokens of its own kinds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from megarl.config.parameter_sets import POLICY
from megarl.ops.aggregate import Aggregation, token_weights
from megarl.ops.masking import zero_masked


@dataclass(frozen=True)
class BatchTotals:
    """Counts of the whole mini-batch, over all data-parallel replicas and micro-batches."""

    tokens: float
    """Trained tokens."""
    sequences: float
    """Sequences that have such tokens."""
    response_tokens: float = 0.0
    """All response tokens of the groups' samples, trained or not."""
    by_kind: Mapping[str, BatchTotals] = field(default_factory=dict)
    """The same of the sequences of each kind."""

    @classmethod
    def of(cls, by_kind: Mapping[str, BatchTotals]) -> BatchTotals:
        """The counts of all kinds together.

        >>> BatchTotals.of({"answer": BatchTotals(7.0, 2.0), "explanation": BatchTotals(3.0, 1.0)}).tokens
        10.0
        """
        parts = list(by_kind.values())
        return cls(
            tokens=sum((part.tokens for part in parts), 0.0),
            sequences=sum((part.sequences for part in parts), 0.0),
            response_tokens=sum((part.response_tokens for part in parts), 0.0),
            by_kind=dict(by_kind),
        )

    def of_kind(self, kind: str) -> BatchTotals:
        """The counts of one kind, zeros where there is none of it."""
        return self.by_kind.get(kind, BatchTotals(0.0, 0.0))


@dataclass(frozen=True)
class LossInputs:
    """The flat tokens of one micro-batch of whole sequences; values that the objective does not declare are None.

    Log-probs and entropies are in nats, float32 or wider. Masked tokens may hold anything, NaN included.
    """

    log_probs_T: Tensor
    """[T] of the current weights, with gradient."""
    entropy_T: Tensor
    """[T] entropy of the policy at each token; with gradient where `Objective.entropy_gradient` asks."""
    mask_T: Tensor
    """[T] 1 on the tokens of the objective's kinds, else 0."""
    sequence_T: Tensor
    """[T] int64, index of the token's sequence in the micro-batch, in 0..S-1 at masked tokens too."""
    num_sequences: int
    lengths_S: Tensor
    """[S] float, counted tokens of each sequence."""
    totals: BatchTotals
    """Of the objective's kinds."""
    kind_S: tuple[str, ...] = ()
    """S kinds, those of the sequences."""
    old_log_probs_T: Tensor | None = None
    """[T], constants: those of the policy before the step's first update, see `Objective.old`."""
    rollout_log_probs_T: Tensor | None = None
    """[T] the engine's log-probs under its sampling distribution."""
    log_probs_under_T: Mapping[str, Tensor] = field(default_factory=dict)
    """[T] each, constants: those under other parameter sets, by the set's name."""
    advantages_T: Tensor | None = None
    """[T]"""
    signals_S: Mapping[str, Tensor] = field(default_factory=dict)
    """[S] each: what `Trained.signals` said of each sequence; 0 where it said nothing."""
    group_S: Tensor | None = None
    """[S] int64, a number that sequences of the same group share."""

    def weights(
        self, kind: Aggregation, counted_T: Tensor, *, constant: float = 1.0, tokens: float | None = None
    ) -> Tensor:
        """[T] of each token in the loss, by the counts of the objective's kinds: `megarl.ops.aggregate.token_weights`.

        `tokens`: what a mean over tokens divides by in place of these.
        """
        return token_weights(
            kind,
            counted_T,
            self.sequence_T,
            self.lengths_S,
            total_tokens=self.totals.tokens if tokens is None else tokens,
            total_sequences=self.totals.sequences,
            constant=constant,
        )

    def under(self, name: str) -> Tensor:
        """[T] log-probs under the parameter set `name`, which the objective declared.

        Raises:
            ValueError: they are not there.
        """
        return required(self.log_probs_under_T.get(name), f"log_probs_under_T[{name!r}]")

    def of_kinds(self, kinds: frozenset[str]) -> Tensor:
        """[S] bool, which sequences are of one of `kinds`.

        Raises:
            ValueError: the kinds are not known.
        """
        if len(self.kind_S) != self.num_sequences:
            raise ValueError(f"LossInputs.kind_S names {len(self.kind_S)} kinds of {self.num_sequences} sequences")
        return are_of(kinds, self.kind_S, self.sequence_T.device)


def are_of(kinds: frozenset[str], kind_S: Sequence[str], device: torch.device) -> Tensor:
    """[S] bool, which of the kinds `kind_S` are among `kinds`; the device is not waited for."""
    return torch.tensor([kind in kinds for kind in kind_S], dtype=torch.bool).to(device, non_blocking=True)


@dataclass(frozen=True)
class LossTerms:
    """A micro-batch's share of the mini-batch's loss, and what to log."""

    loss: Tensor
    """Scalar; the sum over all micro-batches and replicas is the mini-batch's loss, nothing is left to divide."""
    means: dict[str, tuple[Tensor, float]] = field(default_factory=dict)
    """By the name under which it is logged, which no other objective uses: a sum over this micro-batch, a scalar
    (float64) without gradient, and the count of the mini-batch that the sum of all of them is divided by; 0 leaves the
    name out. Every call of one loss gives the same names."""


@dataclass(frozen=True)
class Objective:
    """One loss, the sequences it trains, and the values per token that it needs of them."""

    loss: Callable[[LossInputs], LossTerms]
    """The micro-batch's share of the loss, from its own sequences alone."""
    kinds: frozenset[str] | None = None
    """Kinds of sequences that it trains; None: all."""
    parameters: str = POLICY
    """Parameter set that it is computed with, and that its gradient goes into, unless `goes_to` says otherwise."""
    goes_to: Mapping[str, float] | None = None
    """The parameter sets whose next steps its gradient is a part of, each with a factor: sets that train the base get
    the base's gradient, those that train an adapter the adapter's, each from the one pass that computes both. Where all
    factors are 0 the pass is made without a gradient."""
    apart: str | None = None
    """The name of a pass of its own, which it shares with objectives of that name; they have one `parameters` and one
    `goes_to`. None: it is in the pass of its parameter set."""
    advantages: bool = False
    old: bool = False
    """Needs the log-probs of the policy before the step's first update: PPO's old policy (arXiv 1707.06347, Eq. 6),
    which the ratio and its clip are taken to. Of what the policy itself wrote for the step these are the weights that
    generated; so they are of what the step before has made for this one (`rollout.ahead`), whose old log-probs are
    of the weights of that time. Of what others wrote (other weights, a replayed run) they are not: the samples are
    off-policy, old is the proximal policy of arXiv 2110.00641, and what corrects for who wrote them is the ratio of
    `old` to `rollout`, as with GRPO's `importance_cap`."""
    rollout: bool = False
    """Needs the engine's log-probs: those of the weights that wrote the sample."""
    under: tuple[str, ...] = ()
    """Needs the log-probs under these parameter sets."""
    entropy_gradient: bool = False
    """`LossInputs.entropy_T` must carry a gradient; otherwise it may be computed without."""
    together: bool = False
    """The sequences of a group share a micro-batch."""

    @property
    def in_pass(self) -> str:
        """The name of its pass."""
        return self.apart or self.parameters

    @property
    def gradient_goes_to(self) -> Mapping[str, float]:
        """`goes_to`, or its default."""
        return {self.parameters: 1.0} if self.goes_to is None else self.goes_to

    def trains(self, kind: str) -> bool:
        """Whether sequences of that kind are among its own."""
        return self.kinds is None or kind in self.kinds

    def seen(self, inputs: LossInputs) -> LossInputs:
        """What this objective sees of a micro-batch of all kinds: its own tokens counted, the values it declares."""
        seen = replace(
            inputs,
            advantages_T=inputs.advantages_T if self.advantages else None,
            old_log_probs_T=inputs.old_log_probs_T if self.old else None,
            rollout_log_probs_T=inputs.rollout_log_probs_T if self.rollout else None,
            log_probs_under_T={name: inputs.under(name) for name in self.under if name in inputs.log_probs_under_T},
        )
        if self.kinds is None:
            return seen
        own_S = inputs.of_kinds(self.kinds)
        counts = {kind: counts for kind, counts in inputs.totals.by_kind.items() if kind in self.kinds}
        return replace(
            seen,
            mask_T=inputs.mask_T * own_S[inputs.sequence_T],
            lengths_S=inputs.lengths_S * own_S,
            totals=BatchTotals.of(counts),
        )


def likelihood_loss(inputs: LossInputs, weigh: Callable[[Tensor], Tensor] | None = None) -> LossTerms:
    """-(1 / N) sum over the mini-batch's N counted tokens of w log p(token); w is 1, or what `weigh` makes of log p as
    constants. Logs nothing: the loss says it."""
    counted_T = inputs.mask_T > 0
    log_probs_T = zero_masked(counted_T, inputs.log_probs_T)
    weights_T = inputs.weights("token_mean", counted_T)
    if weigh is not None:
        weights_T = weights_T * weigh(log_probs_T.detach())
    return LossTerms(-(weights_T * log_probs_T).sum())


def total(objectives: Sequence[Objective], inputs: LossInputs) -> LossTerms:
    """The objectives' losses added up, and all that they log. `inputs` are of all kinds.

    Raises:
        ValueError: two of them log a mean of the same name.
    """
    first, *others = [objective.loss(objective.seen(inputs)) for objective in objectives]
    loss, means = first.loss, dict(first.means)
    for number, terms in enumerate(others, start=1):
        loss = loss + terms.loss
        for name in means.keys() & terms.means.keys():
            one = next(one for one, before in zip(objectives, (first, *others), strict=True) if name in before.means)
            both = f"{named(one)} and {named(objectives[number])}"
            raise ValueError(f"the objectives {both} both log {name!r}: give one of the two another name")
        means |= terms.means
    return LossTerms(loss, means)


def named(objective: Objective) -> str:
    """An objective in a message: its loss, and the kinds it trains."""
    loss = getattr(objective.loss, "__qualname__", None) or type(objective.loss).__qualname__
    return f"{loss} of {'all kinds' if objective.kinds is None else ', '.join(sorted(objective.kinds))}"


def sets_read(objectives: Sequence[Objective]) -> tuple[str, ...]:
    """Names of the parameter sets under which some objective needs log-probs."""
    return tuple(dict.fromkeys(name for one in objectives for name in one.under))


@dataclass(frozen=True)
class Round:
    """A part of an update: the passes under one parameter set, and the steps of the sets that then have all of their
    gradient. `hands_on_old`: a later round needs the old log-probs."""

    objectives: tuple[Objective, ...]
    steps: tuple[str, ...]
    hands_on_old: bool


def rounds(objectives: Sequence[Objective]) -> list[Round]:
    """An update's rounds, that under the policy's own weights first, then in the order of the objectives.

    A set takes its step when it has all of its gradient. So an adapter that several models share is the same in all
    rounds, a set that learns from a round of its own is in it what the update begins with, and one that learns from the
    policy's round alone has taken its step when its own comes. One model at a time needs gradients and an optimizer.
    """
    points = sorted(dict.fromkeys(one.parameters for one in objectives), key=lambda name: name != POLICY)
    found: list[Round] = []
    for number, point in enumerate(points):
        mine = tuple(one for one in objectives if one.parameters == point)
        later = [one for one in objectives if one.parameters in points[number + 1 :]]
        waiting = {name for one in later for name in one.gradient_goes_to}
        given = [one for one in objectives if one not in later]
        ready = dict.fromkeys(name for one in given for name, factor in one.gradient_goes_to.items() if factor)
        done = {name for before in found for name in before.steps}
        steps = tuple(sorted((name for name in ready if name not in waiting | done), key=lambda name: name != POLICY))
        found.append(Round(mine, steps, hands_on_old=any(one.old for one in later)))
    return found


def first_pass_is_old(objectives: Sequence[Objective], updates: int) -> bool:
    """Whether the log-probs of a step's first passes under the policy's own weights are the old ones, those of the
    policy before its first update, and need not be measured before it. Of whoever wrote the sequences: see
    `Objective.old`."""
    needed = any(one.old for one in objectives)
    return not needed or (updates <= 1 and any(one.parameters == POLICY for one in objectives))


def counted_alone(inputs: LossInputs) -> LossInputs:
    """`inputs` with the counted tokens alone; the sequences keep their numbers.

    Taken out, and not masked, where other tokens' zeros would change the order in which a sum is rounded.
    """
    kept = (inputs.mask_T > 0).nonzero()[:, 0]
    values = {one.name: getattr(inputs, one.name) for one in fields(inputs) if one.name.endswith("_T")}
    under = {name: value_T[kept] for name, value_T in values.pop("log_probs_under_T").items()}
    taken = {name: value_T[kept] for name, value_T in values.items() if value_T is not None}
    return replace(inputs, **taken, log_probs_under_T=under)


def required(values: Tensor | None, name: str) -> Tensor:
    """`values`, which the objective declared.

    Raises:
        ValueError: they are not there, or the objective did not declare them.
    """
    if values is None:
        raise ValueError(f"LossInputs.{name} is None, but the objective needs it")
    return values
