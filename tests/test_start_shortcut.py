"""START's promise in a world small enough to enumerate: a good answer without good thinking teaches nothing.

A thinking is one or two tokens of the policy, a response is one token. The reward depends on the response alone. Every
possible group is put through the real advantages, spans and loss; their gradients, weighted by the groups'
probabilities, are the exact expectation.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from group_case import group_of
from loss_case import double

from megarl.algorithms.base import AlgorithmContext
from megarl.algorithms.grpo import Grpo
from megarl.algorithms.objective import BatchTotals, LossInputs
from megarl.algorithms.start import Start
from megarl.config.algorithms import GrpoSettings, StartSettings

#: Each thinking's tokens: those of the first decision (row 0) and, after a 1, of the second (row 1).
THINKINGS = ((0,), (1, 0), (1, 1))
REWARDS = (1.0, 0.0, 0.5)
MAX_TOKENS = 8
BLIND = double([0.2, 0.5, 0.3]).expand(3, 3)
READING = torch.stack([double(row) for row in ([0.1, 0.7, 0.2], [0.2, 0.2, 0.6], [0.8, 0.1, 0.1])])


@dataclass(frozen=True)
class Policy:
    """Logits of the thinking's two decisions, [2, 2], and of the response after each thinking, [3, 3]."""

    thinking: torch.Tensor
    response: torch.Tensor

    @classmethod
    def blind(cls) -> Policy:
        """Thinks unevenly, and answers without regard to it."""
        return cls(
            torch.tensor([[0.3, -0.4], [0.1, 0.6]], dtype=torch.float64, requires_grad=True),
            BLIND.log().clone().requires_grad_(),
        )

    @property
    def parameters(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.thinking, self.response

    def thinking_log_probs(self, z: int) -> torch.Tensor:
        """[1 or 2] of the tokens of thinking `z`."""
        table = self.thinking.log_softmax(1)
        return torch.stack([table[row, token] for row, token in enumerate(THINKINGS[z])])

    def expected_reward(self, responder: torch.Tensor | None) -> torch.Tensor:
        """Exact, where `responder` [3, 3], or the policy itself, writes the responses."""
        answers = self.response.softmax(1) if responder is None else responder
        chances = torch.stack([self.thinking_log_probs(z).sum().exp() for z in range(3)])
        return chances @ answers @ double(REWARDS)

    def moved(self, gradients: tuple[torch.Tensor, ...]) -> Policy:
        """The policy after a step of length 0.1 down the gradient."""
        rate = 0.1 / torch.cat([g.flatten() for g in gradients]).norm()
        return Policy(*(p.detach() - rate * g for p, g in zip(self.parameters, gradients, strict=True)))


def group_inputs(algorithm: Grpo, policy: Policy, samples: tuple[tuple[int, int], ...]) -> LossInputs:
    """The group of `samples`, (thinking, response) each, as the loop hands it to the loss."""
    ends = tuple(len(THINKINGS[z]) for z, _ in samples)
    lengths = tuple(end + 1 for end in ends)
    group = group_of((REWARDS[y] for _, y in samples), lengths, ends)
    spans = algorithm.spans(1, group)
    table = policy.response.log_softmax(1)
    log_probs_T = torch.cat([torch.cat([policy.thinking_log_probs(z), table[z, y, None]]) for z, y in samples])
    sequence_T = torch.tensor([s for s, length in enumerate(lengths) for _ in range(length)])
    trained = [end - first for first, end in spans]
    return LossInputs(
        log_probs_T=log_probs_T,
        entropy_T=torch.zeros_like(log_probs_T).detach(),
        old_log_probs_T=log_probs_T.detach(),
        advantages_T=double(algorithm.advantages(group))[sequence_T],
        mask_T=double([first <= t < end for (first, end), n in zip(spans, lengths, strict=True) for t in range(n)]),
        sequence_T=sequence_T,
        num_sequences=len(samples),
        lengths_S=double(trained),
        totals=BatchTotals(float(sum(trained)), float(len(samples)), float(sum(lengths))),
    )


def expected_gradient(
    algorithm: Grpo, policy: Policy, responder: torch.Tensor | None, group_size: int
) -> tuple[torch.Tensor, ...]:
    """d E[loss] / d parameters over all groups, where `responder` or the policy itself writes the responses."""
    answers = policy.response.softmax(1).detach() if responder is None else responder
    chances = [policy.thinking_log_probs(z).sum().exp().item() for z in range(3)]
    total = torch.zeros((), dtype=torch.float64)
    for samples in itertools.product(itertools.product(range(3), range(3)), repeat=group_size):
        chance = 1.0
        for z, y in samples:
            chance *= chances[z] * answers[z, y].item()
        total = total + chance * algorithm.loss(group_inputs(algorithm, policy, samples)).loss
    return torch.autograd.grad(total, policy.parameters, materialize_grads=True)


def start(group_size: int, **chosen) -> Start:
    return Start(StartSettings(responder="initial", **chosen), AlgorithmContext(MAX_TOKENS, group_size))


def grpo(group_size: int, **chosen) -> Grpo:
    return Grpo(GrpoSettings(**chosen), AlgorithmContext(MAX_TOKENS, group_size))


KINDS = [
    {"aggregation": aggregation, "normalize_std": normalize}
    for aggregation in ("token_mean", "sequence_mean", "constant")
    for normalize in (True, False)
]


@pytest.mark.parametrize("chosen", KINDS, ids=lambda each: "-".join(map(str, each.values())))
@pytest.mark.parametrize("group_size", [2, 3])
def test_s6_a_responder_that_ignores_the_thinking_teaches_it_nothing(chosen, group_size):
    """Every single group has a gradient; their expectation has none."""
    policy, algorithm = Policy.blind(), start(group_size, **chosen)
    thinking, response = expected_gradient(algorithm, policy, BLIND, group_size)
    assert thinking.abs().max() < 1e-16
    assert response.count_nonzero() == 0
    one_group = algorithm.loss(group_inputs(algorithm, policy, ((0, 0), (1, 1), (2, 1))[:group_size])).loss
    assert torch.autograd.grad(one_group, policy.thinking)[0].abs().max() > 0.01


@pytest.mark.parametrize("chosen", KINDS, ids=lambda each: "-".join(map(str, each.values())))
def test_s6_grpo_takes_the_shortcut(chosen):
    """In the same place it learns to answer without regard to the thinking, and its reward rises."""
    policy = Policy.blind()
    gradients = expected_gradient(grpo(2, **chosen), policy, None, 2)
    assert gradients[1].abs().max() > 1e-3
    before = policy.expected_reward(None)
    assert policy.moved(gradients).expected_reward(None) > before + 1e-3
    # None of it is owed to better thinking.
    assert abs(policy.moved(gradients).expected_reward(BLIND) - before) < 1e-15


@pytest.mark.parametrize("chosen", KINDS, ids=lambda each: "-".join(map(str, each.values())))
def test_a_responder_that_reads_the_thinking_improves_it(chosen):
    policy = Policy.blind()
    gradients = expected_gradient(start(2, **chosen), policy, READING, 2)
    assert gradients[1].count_nonzero() == 0
    before = policy.expected_reward(READING)
    assert policy.moved(gradients).expected_reward(READING) > before + 1e-3


@pytest.mark.parametrize("group_size", [2, 3])
def test_without_normalisation_it_is_the_gradient_of_the_expected_reward(group_size):
    """R_i - mean R leaves (G - 1) / G of the policy gradient of the thinking, the responder's answers being fixed."""
    policy = Policy.blind()
    algorithm = start(group_size, aggregation="constant", normalize_std=False)
    found, _ = expected_gradient(algorithm, policy, READING, group_size)
    exact = torch.autograd.grad(policy.expected_reward(READING), policy.thinking)[0]
    expected = -(group_size - 1) / (group_size * MAX_TOKENS) * exact
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-17)
    assert exact.abs().min() > 1e-3
