"""For tests of losses: the ways in which the sequences of a mini-batch are spread over ranks and micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from megarl.algorithms.objective import LossInputs, LossTerms, required
from megarl.config.parameter_sets import REFERENCE

CONSTANTS = ("entropy_T", "old_log_probs_T", "rollout_log_probs_T", "advantages_T")
PER_TOKEN = ("log_probs_T", *CONSTANTS, "mask_T", "sequence_T")
PER_SEQUENCE = ("lengths_S", "group_S")


def double(values: Sequence[float], grad: bool = False) -> torch.Tensor:
    """A float64 tensor."""
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


def log_ratios(inputs: LossInputs) -> torch.Tensor:
    """[T] log-probs less the old ones."""
    return inputs.log_probs_T - required(inputs.old_log_probs_T, "old_log_probs_T")


def take(inputs: LossInputs, tokens: torch.Tensor, **changes) -> LossInputs:
    """`inputs` with only `tokens` (indices), views of the same leaves; the sequences keep their numbers."""
    parts = {name: getattr(inputs, name) for name in PER_TOKEN}
    under = {name: part[tokens] for name, part in inputs.log_probs_under_T.items()}
    taken = {name: part[tokens] for name, part in parts.items() if part is not None}
    return replace(inputs, **taken, log_probs_under_T=under, **changes)


def constants_of(inputs: LossInputs) -> dict[str, torch.Tensor]:
    """What a loss takes for constant, by field, those under the reference as "reference"."""
    found = {name: getattr(inputs, name) for name in CONSTANTS}
    return {name: value for name, value in (found | dict(inputs.log_probs_under_T)).items() if value is not None}


def with_constants(inputs: LossInputs, values: dict[str, torch.Tensor]) -> LossInputs:
    """`inputs` with other values of what `constants_of` names."""
    under = {REFERENCE: values[REFERENCE]} if REFERENCE in values else {}
    fields = {name: value for name, value in values.items() if name != REFERENCE}
    return replace(inputs, **fields, log_probs_under_T=dict(inputs.log_probs_under_T) | under)


def logged_sums(terms: LossTerms) -> dict[str, torch.Tensor]:
    """The sums of what is logged, without the counts they are divided by."""
    return {name: value for name, (value, _) in terms.means.items()}


def micro_batch(inputs: LossInputs, members: list[int]) -> LossInputs:
    """Whole sequences `members` alone, renumbered, with the totals of the whole mini-batch."""
    tokens = torch.cat([torch.nonzero(inputs.sequence_T == member)[:, 0] for member in members])
    renumbered = torch.tensor([members.index(int(inputs.sequence_T[t])) for t in tokens], dtype=torch.int64)
    parts = {name: getattr(inputs, name) for name in PER_SEQUENCE}
    part = take(
        inputs,
        tokens,
        num_sequences=len(members),
        kind_S=tuple(inputs.kind_S[member] for member in members if inputs.kind_S),
        signals_S={name: values[members] for name, values in inputs.signals_S.items()},
        **{name: values[members] for name, values in parts.items() if values is not None},
    )
    return replace(part, sequence_T=renumbered)


def by_sequence(whole: LossInputs, owners: Sequence[int]) -> list[LossInputs]:
    """Micro-batches of whole sequences, by the owner of each."""
    split = [[s for s in range(whole.num_sequences) if owners[s] == owner] for owner in sorted(set(owners))]
    return [micro_batch(whole, members) for members in split if members]


def assert_micro_batches_add_up(algorithm: Any, whole: LossInputs, parts: list[LossInputs]) -> None:
    """The micro-batches' losses, gradients and logged sums add up to those of the whole mini-batch."""
    expected, terms = algorithm.loss(whole), [algorithm.loss(part) for part in parts]
    leaves = (whole.log_probs_T, whole.entropy_T)
    summed = torch.stack([term.loss for term in terms]).sum()
    torch.testing.assert_close(summed, expected.loss, rtol=1e-13, atol=1e-14)
    pairs = (torch.autograd.grad(loss, leaves, materialize_grads=True) for loss in (summed, expected.loss))
    for found, wanted in zip(*pairs, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)
    for name, wanted in logged_sums(expected).items():
        assert sum(logged_sums(term)[name].item() for term in terms) == pytest.approx(wanted.item(), rel=1e-12)
