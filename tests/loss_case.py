"""For tests of losses: the ways in which the tokens of a mini-batch are spread over ranks and micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from megarl.algorithms.base import Algorithm, LossInputs, required
from megarl.ops.segments import LocalReducer

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
    """The shard that holds only `tokens` (indices), views of the same leaves."""
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


class WholeReducer:
    """Stands for the collective of ranks that share sequences: adds what the other shards hold of each sum."""

    def __init__(self, others_S: torch.Tensor) -> None:
        self.others_S = others_S

    def sum_by_sequence(self, values_T: torch.Tensor, sequence_T: torch.Tensor, num_sequences: int) -> torch.Tensor:
        """See `megarl.ops.segments.Reducer`."""
        return LocalReducer().sum_by_sequence(values_T, sequence_T, num_sequences) + self.others_S


def by_sequence(whole: LossInputs, owners: Sequence[int]) -> list[LossInputs]:
    """Micro-batches of whole sequences, by the owner of each."""
    split = [[s for s in range(whole.num_sequences) if owners[s] == owner] for owner in sorted(set(owners))]
    return [micro_batch(whole, members) for members in split if members]


def by_token(whole: LossInputs, owners: Sequence[int], num_owners: int) -> list[LossInputs]:
    """Shards of single tokens, as under context parallelism, for losses that sum log-ratios over sequences.

    A shard may hold no token of a sequence, or none at all.
    """
    owner_T = torch.tensor(owners[: whole.log_probs_T.shape[0]])
    log_ratio_T = torch.where(whole.mask_T > 0, log_ratios(whole), 0.0)
    shards = []
    for owner in range(num_owners):
        elsewhere = torch.nonzero(owner_T != owner)[:, 0]
        others_S = LocalReducer().sum_by_sequence(
            log_ratio_T[elsewhere], whole.sequence_T[elsewhere], whole.num_sequences
        )
        shards.append(take(whole, torch.nonzero(owner_T == owner)[:, 0], reducer=WholeReducer(others_S)))
    return shards


def assert_shards_add_up(algorithm: Algorithm, whole: LossInputs, shards: list[LossInputs]) -> None:
    """The shards' losses, gradients and logged sums add up to those of the whole mini-batch."""
    expected, terms = algorithm.loss(whole), [algorithm.loss(shard) for shard in shards]
    leaves = (whole.log_probs_T, whole.entropy_T)
    summed = torch.stack([term.loss for term in terms]).sum()
    torch.testing.assert_close(summed, expected.loss, rtol=1e-13, atol=1e-14)
    pairs = (torch.autograd.grad(loss, leaves, materialize_grads=True) for loss in (summed, expected.loss))
    for found, wanted in zip(*pairs, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)
    for name, wanted in expected.token_sums.items():
        assert sum(term.token_sums[name].item() for term in terms) == pytest.approx(wanted.item(), rel=1e-12)
