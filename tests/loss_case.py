"""For tests of losses: the ways in which the sequences of a mini-batch are spread over ranks and micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from megarl.algorithms.base import Algorithm
from megarl.algorithms.objective import LossInputs, required

CONSTANTS = ("entropy_T", "old_log_probs_T", "rollout_log_probs_T", "reference_log_probs_T", "advantages_T")
PER_TOKEN = ("log_probs_T", *CONSTANTS, "mask_T", "sequence_T")
PER_SEQUENCE = ("lengths_S", "target_S", "group_S")


def double(values: Sequence[float], grad: bool = False) -> torch.Tensor:
    """A float64 tensor."""
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


def log_ratios(inputs: LossInputs) -> torch.Tensor:
    """[T] log-probs less the old ones."""
    return inputs.log_probs_T - required(inputs.old_log_probs_T, "old_log_probs_T")


def take(inputs: LossInputs, tokens: torch.Tensor, **changes) -> LossInputs:
    """`inputs` with only `tokens` (indices), views of the same leaves; the sequences keep their numbers."""
    parts = {name: getattr(inputs, name) for name in PER_TOKEN}
    return replace(inputs, **{name: part[tokens] for name, part in parts.items() if part is not None}, **changes)


def micro_batch(inputs: LossInputs, members: list[int]) -> LossInputs:
    """Whole sequences `members` alone, renumbered, with the totals of the whole mini-batch."""
    tokens = torch.cat([torch.nonzero(inputs.sequence_T == member)[:, 0] for member in members])
    renumbered = torch.tensor([members.index(int(inputs.sequence_T[t])) for t in tokens], dtype=torch.int64)
    parts = {name: getattr(inputs, name) for name in PER_SEQUENCE}
    part = take(
        inputs,
        tokens,
        num_sequences=len(members),
        signals_S={name: values[members] for name, values in inputs.signals_S.items()},
        **{name: values[members] for name, values in parts.items() if values is not None},
    )
    return replace(part, sequence_T=renumbered)


def by_sequence(whole: LossInputs, owners: Sequence[int]) -> list[LossInputs]:
    """Micro-batches of whole sequences, by the owner of each."""
    split = [[s for s in range(whole.num_sequences) if owners[s] == owner] for owner in sorted(set(owners))]
    return [micro_batch(whole, members) for members in split if members]


def assert_micro_batches_add_up(algorithm: Algorithm, whole: LossInputs, parts: list[LossInputs]) -> None:
    """The micro-batches' losses, gradients and logged sums add up to those of the whole mini-batch."""
    expected, terms = algorithm.loss(whole), [algorithm.loss(part) for part in parts]
    leaves = (whole.log_probs_T, whole.entropy_T)
    summed = torch.stack([term.loss for term in terms]).sum()
    torch.testing.assert_close(summed, expected.loss, rtol=1e-13, atol=1e-14)
    pairs = (torch.autograd.grad(loss, leaves, materialize_grads=True) for loss in (summed, expected.loss))
    for found, wanted in zip(*pairs, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)
    for name, wanted in expected.token_sums.items():
        assert sum(term.token_sums[name].item() for term in terms) == pytest.approx(wanted.item(), rel=1e-12)
