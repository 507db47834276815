"""What a pass with gradients makes of log-probs: the objectives' losses, and the numbers to log, over all ranks."""

from __future__ import annotations

import time
from collections.abc import Mapping
from collections.abc import Sequence as Sequences
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from megarl.algorithms.objective import BatchTotals, LossInputs, LossTerms, Objective, are_of, sets_read, total
from megarl.parallel.exchange import gather_all
from megarl.policy.batch import MicroBatch, apart
from megarl.policy.passes import Work
from megarl.records import Sequence

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass with gradients over a mini-batch, the same on all ranks.

    `means` are the objectives' means over the mini-batch, and beside them what the pass knows of all tokens that an
    engine made (or of all tokens, where it made none): `entropy`; of the kinds that the weights of the old log-probs
    wrote, `logprob_gap_mean` and `logprob_k3`, the gap between the old log-probs and the engine's; and what
    `Experts.report` says. `gap_max` is the largest gap. `loss_seconds` is the longest time that a rank spent in the
    objectives' losses (the backward pass, and work that a GPU has queued, left out).
    """

    loss: float
    means: dict[str, float]
    gap_max: float
    loss_seconds: float
    real_tokens: int
    computed_tokens: int
    grad_norms: Mapping[str, float] = field(default_factory=dict)
    """Where its gradient is a part of what steps apply: its norm, by the sets of its network that train."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What all ranks know of a mini-batch's sequences before a pass: kinds that an engine made, and which of them the
    weights of their old log-probs wrote throughout: there engine and policy must agree."""

    made: frozenset[str]
    compared: frozenset[str]


def look_over(
    sequences: Sequences[Sequence], objectives: Sequences[Objective], *, old_is_current: bool, last_stage: bool
) -> Facts:
    """Facts of the mini-batch of which `sequences` are this rank's. Collective.

    Raises:
        ValueError: on all ranks, where a sequence lacks a value per token that an objective needs.
    """
    lacking = None
    if last_stage:
        lacking = next((found for o in objectives for s in sequences if (found := _lacks(s, o, old_is_current))), None)
    made = [s for s in sequences if s.rollout_log_probs is not None]
    unknown = last_stage and not old_is_current
    others = {s.kind for s in made if not s.old_wrote or (unknown and s.old_log_probs is None)}
    parts = gather_all((lacking, {s.kind for s in made}, others))
    for words, *_ in parts:
        if words is not None:
            raise ValueError(words)
    kinds = frozenset().union(*(kinds for _, kinds, _ in parts))
    return Facts(kinds, kinds.difference(*(kinds for *_, kinds in parts)))


def _lacks(sequence: Sequence, objective: Objective, old_is_current: bool) -> str | None:
    """The first value that the objective needs of the sequence and that it does not have, in words."""
    if not objective.trains(sequence.kind):
        return None
    needed = {
        "advantages": objective.advantages and sequence.advantages is None,
        "old_log_probs": objective.old and not old_is_current and sequence.old_log_probs is None,
        "rollout_log_probs": objective.rollout and sequence.rollout_log_probs is None,
    }
    needed |= {f"log_probs_under[{name!r}]": name not in sequence.log_probs_under for name in objective.under}
    for name, missing in needed.items():
        if missing:
            return f"a sequence of kind {sequence.kind!r} has no {name}, which an objective needs"
    return None


class LossStage:
    """The objectives' losses on each micro-batch, and this replica's shares of the loss and of the means to log.

    What is logged stays on the device until the pass ends: whoever reads a number waits for all that a GPU has queued.
    """

    def __init__(
        self,
        objectives: Sequences[Objective],
        totals: BatchTotals,
        facts: Facts,
        *,
        old_is_current: bool,
        keeps_old: bool = False,
    ) -> None:
        self.objectives, self.totals, self.facts, self.old_is_current = objectives, totals, facts, old_is_current
        self.entropy_gradient = any(objective.entropy_gradient for objective in objectives)
        self.seconds = 0.0
        # Scalars in float64.
        self._loss: torch.Tensor | None = None
        self._gap_max: torch.Tensor | None = None
        self._shares: dict[str, torch.Tensor] = {}
        self._keeps_old = keeps_old
        # Of the micro-batches: old log-probs, and of their sequences positions in the pass and trained tokens.
        self._old: list[torch.Tensor] = []
        self._members: list[int] = []
        self._trained: list[int] = []

    def __call__(
        self, batch: MicroBatch, members: list[int], log_probs: torch.Tensor, entropy: torch.Tensor
    ) -> torch.Tensor:
        old = _filled(batch.old_log_probs, log_probs)
        if self.old_is_current:
            # But for tokens that an earlier step's weights wrote.
            old = torch.where(old.isnan(), log_probs.detach(), old)
        rollout = _filled(batch.rollout_log_probs, log_probs)
        if self._keeps_old:
            self._old.append(old)
            self._members += members
            self._trained += batch.trained
        start = time.perf_counter()
        terms = total(
            self.objectives,
            LossInputs(
                log_probs_T=log_probs,
                entropy_T=entropy,
                mask_T=torch.ones_like(log_probs),
                sequence_T=batch.sequence,
                num_sequences=batch.num_sequences,
                lengths_S=batch.lengths,
                totals=self.totals,
                kind_S=batch.kinds,
                old_log_probs_T=old,
                rollout_log_probs_T=rollout,
                log_probs_under_T={
                    name: _filled(batch.log_probs_under.get(name), log_probs) for name in sets_read(self.objectives)
                },
                advantages_T=_filled(batch.advantages, log_probs),
                signals_S=batch.signals,
                group_S=batch.group,
            ),
        )
        self.seconds += time.perf_counter() - start
        loss = terms.loss.detach().double()
        self._loss = loss if self._loss is None else self._loss + loss
        self._log(terms, batch, old - rollout, entropy.detach())
        return terms.loss

    def _log(self, terms: LossTerms, batch: MicroBatch, gap: torch.Tensor, entropy: torch.Tensor) -> None:
        means, made = dict[str, tuple[torch.Tensor, float]](), self.facts.made
        if self.facts.compared:
            own_T, count = self._tokens_of(batch, self.facts.compared)
            gap = torch.where(own_T, gap, 0.0)
            means |= {
                "logprob_gap_mean": (gap.abs().sum(), count),
                "logprob_k3": ((gap.exp() - 1 - gap).sum(), count),
            }
            largest = gap.abs().max().double()
            self._gap_max = largest if self._gap_max is None else torch.maximum(self._gap_max, largest)
        own_T, count = self._tokens_of(batch, made or frozenset(batch.kinds).union(self.totals.by_kind))
        means["entropy"] = torch.where(own_T, entropy, 0.0).sum(), count
        for name, (value, of) in joined(means, terms.means).items():
            if of:
                share = value.detach().double() / of
                self._shares[name] = self._shares[name] + share if name in self._shares else share

    def hand_on(self, sequences: Sequences[Sequence]) -> None:
        """Give the pass's sequences the old log-probs that were kept; on the last pipeline stage."""
        for position, log_probs in zip(self._members, apart(self._old, self._trained), strict=True):
            sequences[position].old_log_probs = log_probs

    def _tokens_of(self, batch: MicroBatch, kinds: frozenset[str]) -> tuple[torch.Tensor, float]:
        """[T] bool, which tokens are of these kinds, and how many the mini-batch has of them."""
        own = are_of(kinds, batch.kinds, batch.sequence.device)
        return own[batch.sequence], sum(c.tokens for kind, c in self.totals.by_kind.items() if kind in kinds)

    def gather(self, work: Work, *, reports: bool) -> Pass:
        """The pass, summed over the replicas' `reports`. Collective."""
        mine = (*self._numbers(), self.seconds, work) if reports else None
        present = [part for part in gather_all(mine) if part is not None]
        # A replica whose micro-batches are all empty has no names.
        names = dict.fromkeys(name for part in present for name in part[1])
        return Pass(
            loss=sum(part[0] for part in present),
            means={name: sum(part[1].get(name, 0.0) for part in present) for name in names},
            gap_max=max(part[2] for part in present),
            loss_seconds=max(part[3] for part in present),
            real_tokens=sum(part[4].real_tokens for part in present),
            computed_tokens=sum(part[4].computed_tokens for part in present),
        )

    def _numbers(self) -> tuple[float, dict[str, float], float]:
        """Loss, shares and the largest gap, read in one transfer; zeros of a pass without sequences."""
        if self._loss is None:
            return 0.0, {}, 0.0
        gap_max = torch.zeros_like(self._loss) if self._gap_max is None else self._gap_max
        loss, largest, *shares = torch.stack([self._loss, gap_max, *self._shares.values()]).tolist()
        return loss, dict(zip(self._shares, shares, strict=True)), largest


def joined(own: Mapping[str, Value], logged: Mapping[str, Value]) -> dict[str, Value]:
    """What a pass says of itself and what its objectives log.

    Raises:
        ValueError: both have one name.
    """
    for name in own.keys() & logged.keys():
        raise ValueError(f"an objective logs {name!r}, as the pass itself does: give the objective's another name")
    return {**own, **logged}


def _filled(values: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """NaN where no sequence of the micro-batch has the value: then none of them needs it."""
    return torch.full_like(like, torch.nan) if values is None else values
