"""Mini-batches for the tests of NFT, with what NFT says of each sample."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from group_case import group_of
from loss_case import double

from megarl.algorithms.base import AlgorithmContext, Group
from megarl.algorithms.nft import Nft
from megarl.algorithms.objective import BatchTotals, LossInputs
from megarl.config.algorithms import NftSettings

CONTEXT = AlgorithmContext(max_tokens=64, group_size=4)
Groups = Sequence[Sequence[float]]
#: Success rates 1/4, 1/2, 2/3 and 1/16, all inside the clamp.
MIXED: Groups = ((1, 0, 0, 0), (1, 0), (0, 1, 1), (0,) * 15 + (1,))
UNMIXED: Groups = ((1, 1, 1), (0, 0))
LEVELS = ["token", "sequence"]
AGGREGATIONS: list[dict[str, Any]] = [
    {"aggregation": "token_mean"},
    {"aggregation": "constant", "aggregation_constant": 10.0},
]


def nft(**chosen) -> Nft:
    return Nft(NftSettings(**chosen), CONTEXT)


def outcome(rewards: Sequence[float]) -> Group:
    return group_of(map(float, rewards))


def make_batch(groups: Groups, seed: int = 0, spread: float = 0.0, masked_share: float = 0.0) -> LossInputs:
    """A mini-batch of groups, as the loop makes it but for what the algorithm says of each sample.

    Log-ratios have the standard deviation `spread` and, where it is not 0, some large jumps; 0 is on-policy.
    """
    draw = random.Random(seed)
    group = [g for g, rewards in enumerate(groups) for _ in rewards]
    sequence = [s for s in range(len(group)) for _ in range(draw.randint(1, 4))]
    mask = [float(draw.random() >= masked_share) for _ in sequence]
    old = [-draw.uniform(0.01, 4.0) for _ in sequence]
    jumps = [draw.choice([0.0, 0.0, 0.0, 0.0, 2.0, -2.0, 11.0]) if spread else 0.0 for _ in sequence]
    log_probs = [x + draw.gauss(0.0, spread) + jump for x, jump in zip(old, jumps, strict=True)] if spread else old
    lengths = [sum(m for m, s in zip(mask, sequence, strict=True) if s == index) for index in range(len(group))]
    return LossInputs(
        log_probs_T=double(log_probs, grad=True),
        entropy_T=double([draw.uniform(0.0, 3.0) for _ in sequence], grad=True),
        old_log_probs_T=double(old),
        mask_T=double(mask),
        sequence_T=torch.tensor(sequence),
        num_sequences=len(group),
        lengths_S=double(lengths),
        group_S=torch.tensor(group),
        totals=BatchTotals(tokens=sum(mask), sequences=float(len(group))),
    )


def signalled(algorithm: Nft, groups: Groups, inputs: LossInputs) -> LossInputs:
    """`inputs` with the algorithm's signals."""
    found = [algorithm.signals(outcome(rewards)) for rewards in groups]
    return replace(inputs, signals_S={name: double([x for each in found for x in each[name]]) for name in found[0]})


def rewards_of_tokens(groups: Groups, inputs: LossInputs) -> torch.Tensor:
    return double([x for rewards in groups for x in rewards])[inputs.sequence_T]
