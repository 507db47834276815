"""On-policy distillation: value and gradient against numbers worked out by hand, and against the reverse KL itself."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch

from megarl.algorithms.base import AlgorithmContext, Group
from megarl.algorithms.objective import BatchTotals, LossInputs, LossTerms
from megarl.algorithms.opd import Opd
from megarl.config.algorithms import OpdSettings
from megarl.ops.segments import discounted_sums
from megarl.records import Prompt


def opd(**settings: Any) -> Opd:
    return Opd(OpdSettings.model_validate(settings), AlgorithmContext(max_tokens=8, group_size=2))


def loss_of(
    algorithm: Opd, current: torch.Tensor, old: torch.Tensor, teacher: torch.Tensor, lengths: list[int]
) -> LossTerms:
    """The loss on answers of these lengths, a whole mini-batch; log-probs (T,) of their tokens one after the other."""
    (objective,) = algorithm.objectives
    totals = BatchTotals(float(sum(lengths)), float(len(lengths)))
    inputs = LossInputs(
        log_probs_T=current,
        entropy_T=torch.full_like(current, torch.nan),
        mask_T=torch.ones_like(current),
        sequence_T=torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)),
        num_sequences=len(lengths),
        lengths_S=torch.tensor(lengths, dtype=torch.float64),
        totals=BatchTotals.of({"answer": totals}),
        kind_S=("answer",) * len(lengths),
        old_log_probs_T=old,
        log_probs_under_T={"teacher": teacher},
    )
    return objective.loss(objective.seen(inputs))


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


#: Two answers, of two tokens and of one.
OLD, TEACHER, CURRENT = column(-1.0, -2.0, -0.5), column(-0.5, -4.0, -0.25), column(-0.9, -2.5, -0.5)


@pytest.mark.parametrize(
    ("settings", "advantages", "ratios", "gradient"),
    [
        # teacher - old; the gradient of -(1/3) ratio x advantage is itself.
        ({}, (0.5, -2.0, 0.25), (math.exp(0.1), math.exp(-0.5), 1.0), None),
        ({"advantage_cap": 1.0}, (0.5, -1.0, 0.25), (math.exp(0.1), math.exp(-0.5), 1.0), None),
        # The first token answers for half of the second's; the answers are apart.
        ({"discount": 0.5}, (0.5 - 0.5 * 2.0, -2.0, 0.25), (math.exp(0.1), math.exp(-0.5), 1.0), None),
        ({"discount": 1.0}, (-1.5, -2.0, 0.25), (math.exp(0.1), math.exp(-0.5), 1.0), None),
        # exp(0.1) passes the upper bound, exp(-0.5) the lower one, each on the side of its advantage.
        ({"clip_low": 0.2, "clip_high": 0.05}, (0.5, -2.0, 0.25), (1.05, 0.8, 1.0), (0.0, 0.0, -0.25 / 3)),
    ],
)
def test_value_and_gradient_are_those_worked_out(
    settings: dict[str, Any], advantages: Any, ratios: Any, gradient: Any
) -> None:
    current = CURRENT.clone().requires_grad_()
    terms = loss_of(opd(**settings), current, OLD, TEACHER, [2, 1])
    terms.loss.backward()
    products = [ratio * advantage for ratio, advantage in zip(ratios, advantages, strict=True)]
    assert terms.loss.item() == pytest.approx(-sum(products) / 3, abs=1e-15)
    wanted = [-one / 3 for one in products] if gradient is None else gradient
    assert current.grad is not None
    assert current.grad.tolist() == pytest.approx(wanted, abs=1e-15)
    means = {name: float(value) / count for name, (value, count) in terms.means.items()}
    # Whatever is capped or clipped, what is logged is the plain estimate.
    assert means["teacher_kl"] == pytest.approx((-0.5 + 2.0 - 0.25) / 3, abs=1e-15)
    assert means.get("clip_share") == (pytest.approx(2 / 3) if "clip_low" in settings else None)
    assert means.get("advantage_cap_share") == (pytest.approx(1 / 3) if "advantage_cap" in settings else None)


def test_means_of_answers() -> None:
    terms = loss_of(opd(aggregation="sequence_mean"), OLD, OLD, TEACHER, [2, 1])
    assert terms.loss.item() == pytest.approx(-((0.5 - 2.0) / 2 + 0.25) / 2, abs=1e-15)


def test_discounted_sums_stay_within_their_sequence() -> None:
    random = torch.Generator().manual_seed(3)
    lengths = [1, 7, 2, 12, 3]
    values = torch.randn(sum(lengths), generator=random, dtype=torch.float64)
    sequence = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    for discount in (0.0, 0.7, 1.0):
        wanted = []
        for part in values.split(lengths):
            wanted += [sum(discount**k * float(one) for k, one in enumerate(part[t:])) for t in range(len(part))]
        assert discounted_sums(values, sequence, discount).tolist() == pytest.approx(wanted, abs=1e-13)


# --- a policy that is a table: the logits of three tokens after each beginning, the first of which ends the answer ----

LONGEST, END = 3, 0
BEGINNINGS: list[tuple[int, ...]] = [part for length in range(LONGEST) for part in product((1, 2), repeat=length)]
ANSWERS = [part for length in range(LONGEST + 1) for part in product(range(3), repeat=length) if len(part) > 0]
ANSWERS = [a for a in ANSWERS if END not in a[:-1] and (a[-1] == END or len(a) == LONGEST)]


def tables() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (beginnings, 3) of the policy and of the teacher."""
    random = torch.Generator().manual_seed(7)
    policy, teacher = torch.randn((2, len(BEGINNINGS), 3), generator=random, dtype=torch.float64)
    return policy.requires_grad_(), teacher


def tokens_of(logits: torch.Tensor, answer: tuple[int, ...]) -> torch.Tensor:
    """Log-probs of the answer's tokens."""
    rows = [BEGINNINGS.index(answer[:place]) for place in range(len(answer))]
    return logits.log_softmax(1)[rows, list(answer)]


def expected_gradient(**settings: Any) -> torch.Tensor:
    """The loss's gradient in the policy's table, in the mean over all answers that it may write."""
    policy, teacher = tables()
    algorithm, total = opd(aggregation="token_sum", **settings), torch.zeros_like(policy)
    for answer in ANSWERS:
        current = tokens_of(policy, answer)
        terms = loss_of(algorithm, current, current.detach(), tokens_of(teacher, answer), [len(answer)])
        (found,) = torch.autograd.grad(terms.loss, policy)
        total += current.detach().sum().exp() * found
    return total


def test_the_answers_are_all() -> None:
    policy = tables()[0].detach()
    assert sum(float(tokens_of(policy, answer).sum().exp()) for answer in ANSWERS) == pytest.approx(1.0, abs=1e-12)


def test_without_discounting_the_expected_gradient_is_that_of_the_whole_reverse_kl() -> None:
    policy, teacher = tables()
    log_probs = torch.stack([tokens_of(policy, answer).sum() for answer in ANSWERS])
    others = torch.stack([tokens_of(teacher, answer).sum() for answer in ANSWERS])
    (exact,) = torch.autograd.grad((log_probs.exp() * (log_probs - others)).sum(), policy)
    torch.testing.assert_close(expected_gradient(discount=1.0), exact, rtol=0, atol=1e-13)
    assert (expected_gradient() - exact).abs().max() > 1e-2


def test_by_default_it_is_that_of_each_tokens_reverse_kl_where_the_policy_comes() -> None:
    """GKD's: nothing flows through how often a beginning is come to."""
    policy, teacher = tables()
    with torch.no_grad():
        visits = torch.stack([tokens_of(policy, part).sum().exp() for part in BEGINNINGS])
    own, other = policy.log_softmax(1), teacher.log_softmax(1)
    (exact,) = torch.autograd.grad((visits * (own.exp() * (own - other)).sum(1)).sum(), policy)
    torch.testing.assert_close(expected_gradient(), exact, rtol=0, atol=1e-13)


def test_teacher_kl_estimates_the_reverse_kl() -> None:
    policy, teacher = tables()
    mean = exact = 0.0
    for answer in ANSWERS:
        own, other = tokens_of(policy, answer).detach(), tokens_of(teacher, answer)
        share = float(own.sum().exp())
        exact += share * float((own - other).sum())
        mean += share * float(loss_of(opd(), own, own, other, [len(answer)]).means["teacher_kl"][0])
    assert mean == pytest.approx(exact, abs=1e-13)
    assert exact > 0.1


def test_a_policy_that_is_its_teacher_learns_nothing() -> None:
    current = CURRENT.clone().requires_grad_()
    terms = loss_of(opd(discount=1.0), current, CURRENT, CURRENT, [2, 1])
    terms.loss.backward()
    assert current.grad is not None
    assert terms.loss.item() == 0.0 and current.grad.abs().max() == 0.0


def test_groups_without_rewards_are_trained() -> None:
    from group_case import group_of

    group: Group = group_of([None, 0.0], [3, 2], prompt=Prompt(0, (1,), "", ""))
    (credit,) = opd().credit(1, [group])
    assert [one.spans[0][:2] for one in credit.trained] == [(0, 3), (0, 2)]
    assert not opd().plan(1).generations[0].needs_reward
