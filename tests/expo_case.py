"""For tests of ExPO's losses: mini-batches of sampled answers and targets, and their parts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megarl.algorithms.base import Algorithm, AlgorithmContext
from megarl.algorithms.objective import BatchTotals, LossInputs, LossTerms, required

CONTEXT = AlgorithmContext(max_tokens=64, group_size=4)
NAN = float("nan")


def make_batch(layout: list[tuple[int, bool, int]], seed: int = 0, junk: float = NAN) -> LossInputs:
    """A whole mini-batch, all tokens counted; targets have `junk` for what only answers have."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([length for _, _, length in layout])
    target_S = torch.tensor([target for _, target, _ in layout])
    sequence = torch.repeat_interleave(torch.arange(len(layout)), lengths)
    target = target_S[sequence]
    total = len(sequence)

    def normal() -> Tensor:
        return torch.randn(total, generator=generator, dtype=torch.float64)

    old = -normal().abs() - 0.1
    return LossInputs(
        log_probs_T=(old + 0.3 * normal()).requires_grad_(),
        entropy_T=normal().abs().requires_grad_(),
        mask_T=torch.ones(total, dtype=torch.float64),
        sequence_T=sequence,
        num_sequences=len(layout),
        lengths_S=lengths.double(),
        totals=BatchTotals(
            tokens=float((~target).sum()),
            sequences=float((~target_S).sum()),
            response_tokens=float((~target).sum()),
            target_tokens=float(target.sum()),
            target_sequences=float(target_S.sum()),
        ),
        old_log_probs_T=old.masked_fill(target, junk),
        rollout_log_probs_T=(old + 0.2 * normal()).masked_fill(target, junk),
        reference_log_probs_T=old + 0.4 * normal(),
        advantages_T=torch.where(sequence % 2 == 0, 1.3, -0.8).double().masked_fill(target, junk),
        target_S=target_S,
        group_S=torch.tensor([group for group, _, _ in layout]),
    )


def is_target(inputs: LossInputs) -> Tensor:
    """[T] bool"""
    return required(inputs.target_S, "target_S")[inputs.sequence_T]


def gradients(terms: LossTerms, inputs: LossInputs) -> tuple[Tensor, Tensor]:
    """d loss / d log-probs and d loss / d entropies, zeros where the loss does not depend on them."""
    found = torch.autograd.grad(
        terms.loss, (inputs.log_probs_T, inputs.entropy_T), allow_unused=True, retain_graph=True
    )
    first, second = (torch.zeros_like(inputs.log_probs_T) if one is None else one for one in found)
    return first, second


def logged(terms: LossTerms) -> dict[str, float]:
    """All sums to log, which are float64 and without gradient."""
    sums = terms.token_sums | terms.target_token_sums | terms.target_sums
    assert all(value.dtype == torch.float64 and not value.requires_grad for value in sums.values())
    return {name: value.item() for name, value in sums.items()}


def assert_parts_add_up(algorithm: Algorithm, whole: LossInputs, parts: list[LossInputs]) -> None:
    """The parts' losses, gradients and logged sums add up to those of the whole mini-batch."""
    expected, terms = algorithm.loss(whole), [algorithm.loss(part) for part in parts]
    summed = LossTerms(torch.stack([term.loss for term in terms]).sum())
    torch.testing.assert_close(summed.loss, expected.loss, rtol=1e-12, atol=1e-14)
    for found, wanted in zip(gradients(summed, whole), gradients(expected, whole), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-14)
    totals = {name: sum(logged(term)[name] for term in terms) for name in logged(expected)}
    assert totals == pytest.approx(logged(expected), rel=1e-11, abs=1e-12)
