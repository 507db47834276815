"""For tests of ExPO's losses: mini-batches of sampled answers and targets, and their parts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megarl.algorithms.base import Algorithm, AlgorithmContext
from megarl.algorithms.objective import BatchTotals, LossInputs, LossTerms, total
from megarl.config.parameter_sets import REFERENCE

CONTEXT = AlgorithmContext(max_tokens=64, group_size=4)
NAN = float("nan")


def make_batch(layout: list[tuple[int, bool, int]], seed: int = 0, junk: float = NAN) -> LossInputs:
    """A whole mini-batch, all tokens counted; explanations have `junk` for what only answers have."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([length for _, _, length in layout])
    kinds = tuple("explanation" if target else "answer" for _, target, _ in layout)
    target_S = torch.tensor([target for _, target, _ in layout])
    sequence = torch.repeat_interleave(torch.arange(len(layout)), lengths)
    target = target_S[sequence]
    number = len(sequence)

    def normal() -> Tensor:
        return torch.randn(number, generator=generator, dtype=torch.float64)

    old = -normal().abs() - 0.1
    return LossInputs(
        log_probs_T=(old + 0.3 * normal()).requires_grad_(),
        entropy_T=normal().abs().requires_grad_(),
        mask_T=torch.ones(number, dtype=torch.float64),
        sequence_T=sequence,
        num_sequences=len(layout),
        lengths_S=lengths.double(),
        totals=totals_of(*(float(part.sum()) for part in (~target, ~target_S, target, target_S))),
        kind_S=kinds,
        old_log_probs_T=old.masked_fill(target, junk),
        rollout_log_probs_T=(old + 0.2 * normal()).masked_fill(target, junk),
        log_probs_under_T={REFERENCE: old + 0.4 * normal()},
        advantages_T=torch.where(sequence % 2 == 0, 1.3, -0.8).double().masked_fill(target, junk),
        group_S=torch.tensor([group for group, _, _ in layout]),
    )


def is_target(inputs: LossInputs) -> Tensor:
    """[T] bool"""
    return inputs.of_kinds(frozenset({"explanation"}))[inputs.sequence_T]


def totals_of(tokens: float, answers: float, target_tokens: float, targets: float) -> BatchTotals:
    """Counts of answers and explanations, all of whose tokens are trained."""
    counts = {"answer": (tokens, answers), "explanation": (target_tokens, targets)}
    return BatchTotals.of({kind: BatchTotals(*counted, counted[0]) for kind, counted in counts.items()})


def loss_of(algorithm: Algorithm, inputs: LossInputs) -> LossTerms:
    """All of the algorithm's objectives on a mini-batch of both kinds."""
    return total(algorithm.objectives, inputs)


def gradients(terms: LossTerms, inputs: LossInputs) -> tuple[Tensor, Tensor]:
    """d loss / d log-probs and d loss / d entropies, zeros where the loss does not depend on them."""
    found = torch.autograd.grad(
        terms.loss, (inputs.log_probs_T, inputs.entropy_T), allow_unused=True, retain_graph=True
    )
    first, second = (torch.zeros_like(inputs.log_probs_T) if one is None else one for one in found)
    return first, second


def logged(terms: LossTerms) -> dict[str, float]:
    """All sums to log, which are float64 and without gradient."""
    sums = {name: value for name, (value, _) in terms.means.items()}
    assert all(value.dtype == torch.float64 and not value.requires_grad for value in sums.values())
    return {name: value.item() for name, value in sums.items()}


def assert_parts_add_up(algorithm: Algorithm, whole: LossInputs, parts: list[LossInputs]) -> None:
    """The parts' losses, gradients and logged sums add up to those of the whole mini-batch."""
    expected, terms = loss_of(algorithm, whole), [loss_of(algorithm, part) for part in parts]
    summed = LossTerms(torch.stack([term.loss for term in terms]).sum())
    torch.testing.assert_close(summed.loss, expected.loss, rtol=1e-12, atol=1e-14)
    for found, wanted in zip(gradients(summed, whole), gradients(expected, whole), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-14)
    totals = {name: sum(logged(term)[name] for term in terms) for name in logged(expected)}
    assert totals == pytest.approx(logged(expected), rel=1e-11, abs=1e-12)
