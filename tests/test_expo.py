"""ExP-GRPO is GRPO plus the likelihood of explanations; and why explanations of the right answer help."""

from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from expo_case import CONTEXT, NAN, assert_parts_add_up, gradients, is_target, logged, loss_of, make_batch, totals_of
from group_case import group_of
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from loss_case import PER_TOKEN, by_sequence, logged_sums, micro_batch
from torch import Tensor

from megarl.algorithms import ALGORITHMS, build
from megarl.algorithms.expo import ExpGrpo
from megarl.algorithms.grpo import Grpo
from megarl.algorithms.objective import BatchTotals, LossInputs, Objective
from megarl.config.algorithms import ALGORITHM_SETTINGS, ExpGrpoSettings, GrpoSettings
from megarl.config.parameter_sets import REFERENCE

#: What GRPO's part of the loss may be: every aggregation and ratio, every further term.
GRPO_SETTINGS: list[dict[str, Any]] = [
    {"aggregation": "token_mean"},
    {"aggregation": "sequence_mean", "ratio_level": "sequence", "clip_low": 3e-4, "clip_high": 4e-4},
    {"aggregation": "constant", "kl_coefficient": 0.1, "entropy_coefficient": 0.05, "importance_cap": 1.2},
    {"aggregation": "sequence_mean", "kl_coefficient": 0.1, "kl_kind": "k2", "dual_clip": 3.0},
]
#: (group, whether it is a target, tokens): targets before, between and after answers, a group without any.
LAYOUT = [(0, True, 3), (0, False, 4), (0, False, 2), (1, False, 5), (1, True, 6), (2, False, 3), (2, True, 1)]


def exp_grpo(**chosen: Any) -> ExpGrpo:
    return ExpGrpo(ExpGrpoSettings.model_validate({"kl_coefficient": 0.0} | chosen), CONTEXT)


def answers_alone(inputs: LossInputs) -> LossInputs:
    """The mini-batch of the sampled answers, as it would be without targets."""
    members = [index for index, kind in enumerate(inputs.kind_S) if kind == "answer"]
    alone = micro_batch(inputs, members)
    return replace(alone, totals=BatchTotals.of({"answer": inputs.totals.of_kind("answer")}))


def test_the_table_has_it_and_it_asks_for_what_it_needs() -> None:
    assert ALGORITHMS["exp_grpo"] is ExpGrpo and ALGORITHM_SETTINGS["exp_grpo"] is ExpGrpoSettings
    asks = build(ExpGrpoSettings(), CONTEXT)
    answers, explanations = asks.objectives
    assert (answers.kinds, answers.old, answers.under) == (frozenset({"answer"}), True, (REFERENCE,))
    assert explanations == Objective(explanations.loss, kinds=frozenset({"explanation"}))
    assert [one.kind for one in asks.plan(1).generations] == ["answer", "explanation"]
    plain = exp_grpo(explanation_weight=0.0)
    assert len(plain.objectives) == 1 and not plain.objectives[0].under
    assert plain.plan(1) == Grpo(GrpoSettings(), CONTEXT).plan(1)


@pytest.mark.parametrize("chosen", GRPO_SETTINGS, ids=str)
@pytest.mark.parametrize("present", ["no targets", "targets"])
def test_e1_without_weight_it_is_grpo_bit_for_bit(chosen: dict[str, Any], present: str) -> None:
    """Values and gradients are equal, not close, also where targets stand among the answers."""
    whole = make_batch(LAYOUT)
    alone = answers_alone(whole)
    inputs = alone
    if present == "targets":
        # Not even a target that the policy could never write.
        impossible = whole.log_probs_T.masked_fill(is_target(whole), -float("inf"))
        inputs = replace(whole, log_probs_T=impossible)
    algorithm = exp_grpo(explanation_weight=0.0, **chosen)
    found, expected = loss_of(algorithm, inputs), Grpo(GrpoSettings(**chosen), CONTEXT).loss(alone)
    assert found.loss.item() == expected.loss.item() != 0.0
    for one, other in zip(gradients(found, whole), gradients(expected, whole), strict=True):
        assert torch.equal(one, other)
    assert gradients(found, whole)[0].count_nonzero() > 0
    assert {name: logged_sums(found)[name] for name in logged_sums(expected)} == logged_sums(expected)
    group = group_of((1.0, 0.0, 0.5), (3, 4, 5), finished=(True, True, False))
    grpo = Grpo(GrpoSettings(**chosen), CONTEXT)
    assert algorithm.credit(1, [group]) == grpo.credit(1, [group])
    assert algorithm.drop_reason(group) == grpo.drop_reason(group)


@pytest.mark.parametrize("chosen", GRPO_SETTINGS, ids=str)
@pytest.mark.parametrize("aggregation", ["token_mean", "sum"])
def test_loss_is_grpo_less_the_weighted_log_likelihood(chosen: dict[str, Any], aggregation: str) -> None:
    whole = make_batch(LAYOUT, seed=3)
    chosen_both = {"explanation_weight": 0.3, "explanation_aggregation": aggregation} | chosen
    found = loss_of(exp_grpo(**chosen_both), whole)
    grpo = Grpo(GrpoSettings(**chosen), CONTEXT).loss(answers_alone(whole))
    target = is_target(whole)
    per_token = 0.3 / (10.0 if aggregation == "token_mean" else 3.0)
    likelihood = sum(value for value, is_one in zip(whole.log_probs_T.tolist(), target.tolist(), strict=True) if is_one)
    assert found.loss.item() == pytest.approx(grpo.loss.item() - per_token * likelihood, rel=1e-14)
    log_probs, entropy = gradients(found, whole)
    expected, expected_entropy = gradients(grpo, whole)
    torch.testing.assert_close(log_probs, expected - per_token * target.double(), rtol=1e-15, atol=0.0)
    assert torch.equal(entropy, expected_entropy)
    assert expected[target].count_nonzero() == 0
    nll = {
        "own_nll": -whole.log_probs_T[~target].sum().item(),
        "explanation_nll": -whole.log_probs_T[target].sum().item(),
    }
    assert logged(found) == pytest.approx(logged(grpo) | nll, rel=1e-14)
    counts = {name: count for name, (_, count) in found.means.items()}
    assert counts.pop("explanation_nll") == 10.0 and set(counts.values()) == {14.0}


class Tabular:
    """A policy of 5 tokens whose distribution depends on the token before: a table of logits [5, 5]."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.logits = torch.randn(5, 5, generator=generator, dtype=torch.float64).requires_grad_()

    def log_probs(self, responses: list[list[int]]) -> Tensor:
        """Log-probs of the responses' tokens after the question, which is token 0, one after another."""
        before = [t for response in responses for t in [0, *response[:-1]]]
        after = [t for response in responses for t in response]
        return self.logits.log_softmax(1)[before, after]


@pytest.mark.parametrize("aggregation", ["token_mean", "sum"])
@pytest.mark.parametrize("grpo_aggregation", ["token_mean", "sequence_mean", "constant"])
@pytest.mark.parametrize("moved", [False, True])
def test_e2_where_all_answers_are_wrong_the_explanation_is_the_only_gradient(
    aggregation: str, grpo_aggregation: str, moved: bool
) -> None:
    """The gradient in the policy's parameters is -beta grad log pi(c, a* | q), exactly; also off policy."""
    policy, beta = Tabular(1), 0.04
    answers, explanation = [[1, 2], [3, 3, 4], [2, 1, 1, 4], [4]], [2, 3, 1, 4]
    algorithm = exp_grpo(explanation_weight=beta, explanation_aggregation=aggregation, aggregation=grpo_aggregation)
    advantages = algorithm.advantages(group_of((0.0,) * 4, map(len, answers)))
    texts = [*answers, explanation]
    sequence = torch.tensor([index for index, text in enumerate(texts) for _ in text])
    log_probs = policy.log_probs(texts)
    loss = loss_of(
        algorithm,
        LossInputs(
            log_probs_T=log_probs,
            entropy_T=torch.zeros_like(log_probs),
            mask_T=torch.ones_like(log_probs),
            sequence_T=sequence,
            num_sequences=5,
            lengths_S=torch.tensor([float(len(text)) for text in texts], dtype=torch.float64),
            totals=totals_of(10.0, 4.0, 4.0, 1.0),
            kind_S=("answer",) * 4 + ("explanation",),
            old_log_probs_T=log_probs.detach() - 0.5 * moved,
            advantages_T=torch.tensor([*advantages, NAN], dtype=torch.float64)[sequence],
        ),
    ).loss
    (found,) = torch.autograd.grad(loss, policy.logits)
    likelihood = policy.log_probs([explanation]).sum()
    # 1/4 is exact, so that no order of the products can round otherwise.
    (expected,) = torch.autograd.grad(-beta * (likelihood if aggregation == "sum" else likelihood / 4), policy.logits)
    assert torch.equal(found, expected)
    assert found.count_nonzero() == 20


@pytest.mark.parametrize("chosen", GRPO_SETTINGS, ids=str)
@pytest.mark.parametrize("junk", [NAN, float("inf"), 1e30])
def test_e4_explanations_change_nothing_of_the_answers_part(chosen: dict[str, Any], junk: float) -> None:
    """Whatever the targets' tokens, lengths and missing values are."""
    algorithm = exp_grpo(explanation_weight=0.3, **chosen)
    longer = [(group, target, length + 2 * target) for group, target, length in LAYOUT]
    first, second = make_batch(LAYOUT, junk=0.0), make_batch(longer, seed=9, junk=junk)
    target = is_target(second)
    for name in PER_TOKEN:
        if name not in ("mask_T", "sequence_T"):
            theirs, ours = getattr(second, name).detach().clone(), getattr(first, name).detach()
            theirs[~target] = ours[~is_target(first)]
            second = replace(second, **{name: theirs.requires_grad_(name in ("log_probs_T", "entropy_T"))})
    reference = second.under(REFERENCE).clone()
    reference[~target] = first.under(REFERENCE)[~is_target(first)]
    second = replace(second, log_probs_under_T={REFERENCE: reference})
    one, other = loss_of(algorithm, first), loss_of(algorithm, second)
    for mine, theirs in zip(gradients(one, first), gradients(other, second), strict=True):
        assert torch.equal(mine[~is_target(first)], theirs[~target])
        assert theirs.isfinite().all()
    assert gradients(one, first)[0][~is_target(first)].count_nonzero() > 0
    sums, theirs = logged_sums(one), logged_sums(other)
    assert sums.pop("explanation_nll") != theirs.pop("explanation_nll") and sums == theirs
    assert other.loss.isfinite() and one.loss.item() != other.loss.item()


@pytest.mark.parametrize("chosen", GRPO_SETTINGS, ids=str)
def test_a_micro_batch_of_answers_alone_or_of_targets_alone(chosen: dict[str, Any]) -> None:
    whole = make_batch(LAYOUT)
    algorithm = exp_grpo(explanation_weight=0.3, **chosen)
    answers = answers_alone(whole)
    targets = micro_batch(whole, [0, 4, 6])
    parts = [loss_of(algorithm, answers), loss_of(algorithm, targets)]
    assert parts[0].loss.item() == Grpo(GrpoSettings(**chosen), CONTEXT).loss(answers).loss.item()
    assert logged(parts[0]).keys() == logged(parts[1]).keys()
    assert logged(parts[0])["explanation_nll"] == 0.0
    assert {value for name, value in logged(parts[1]).items() if name != "explanation_nll"} == {0.0}
    gradient = gradients(parts[1], whole)[0]
    assert gradient[is_target(whole)].tolist() == pytest.approx([-0.03] * 10, rel=1e-14)
    assert gradient[~is_target(whole)].count_nonzero() == 0
    # A mini-batch whose explanations were all left out.
    none = replace(answers, totals=totals_of(14.0, 4.0, 0.0, 0.0))
    assert loss_of(algorithm, none).loss.item() == parts[0].loss.item()


def test_masked_tokens_of_targets_may_hold_anything() -> None:
    whole = make_batch(LAYOUT)
    masked = torch.tensor([1, 17])
    assert is_target(whole)[masked].all()
    counts = whole.lengths_S - torch.bincount(whole.sequence_T[masked], minlength=whole.num_sequences)
    totals = totals_of(14.0, 4.0, 8.0, 3.0)
    clean = replace(whole, mask_T=whole.mask_T.index_fill(0, masked, 0.0), lengths_S=counts, totals=totals)
    leaf = whole.log_probs_T.detach().index_fill(0, masked, NAN).requires_grad_()
    dirty = replace(clean, log_probs_T=leaf)
    one, other = (loss_of(exp_grpo(explanation_weight=0.4), inputs) for inputs in (clean, dirty))
    assert one.loss.item() == other.loss.item()
    assert logged(one) == logged(other)
    gradient = gradients(other, dirty)[0]
    assert torch.equal(gradient, gradients(one, whole)[0])
    assert gradient[masked].tolist() == [0.0, 0.0]
    assert gradient[is_target(whole)].sum().item() == pytest.approx(-0.4, rel=1e-14)


# Any spread over micro-batches


@pytest.mark.parametrize("chosen", GRPO_SETTINGS, ids=str)
@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.booleans(), st.integers(1, 5)), min_size=2, max_size=8),
    owners=st.lists(st.integers(0, 2), min_size=8, max_size=8),
    aggregation=st.sampled_from(["token_mean", "sum"]),
    seed=st.integers(0, 1000),
)
def test_exp_grpo_micro_batches_add_up(
    chosen: dict[str, Any], lengths: list[tuple[bool, int]], owners: list[int], aggregation: str, seed: int
) -> None:
    whole = make_batch([(group, *rest) for group, rest in enumerate(lengths)], seed)
    algorithm = exp_grpo(explanation_weight=0.3, explanation_aggregation=aggregation, **chosen)
    assert_parts_add_up(algorithm, whole, by_sequence(whole, owners))


# E6: why explanations help, exactly, where all chains can be listed

CHAINS = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 20)), min_size=1, max_size=8)


@given(CHAINS)
def test_e6_chains_given_the_answer_lead_to_it_more_often(chains: list[tuple[int, int]]) -> None:
    """Chains c of probability pi(c|q) lead to a* with p(c). Those drawn knowing a* do so E[p^2] / E[p] of the time,
    by Var[p] / E[p] more often. In fractions: equal, not close."""
    weight = sum(weight for weight, _ in chains)
    prior = [Fraction(w, weight) for w, _ in chains]
    success = [Fraction(p, 20) for _, p in chains]
    mean = sum(w * p for w, p in zip(prior, success, strict=True))
    assume(mean > 0)
    posterior = [w * p / mean for w, p in zip(prior, success, strict=True)]
    assert sum(posterior) == 1
    found = sum(w * p for w, p in zip(posterior, success, strict=True))
    variance = sum(w * (p - mean) ** 2 for w, p in zip(prior, success, strict=True))
    assert found - mean == variance / mean >= 0
    assert (found == mean) == (len({p for w, p in zip(prior, success, strict=True) if w}) == 1)


@pytest.mark.parametrize("seed", range(4))
def test_e6_the_ideal_explanation_is_the_gradient_of_success(seed: int) -> None:
    """With c drawn from the posterior pi(c | q, a*), the expected gradient of ExP-GRPO on a group of wrong answers is
    that of -beta log P(a* | q), all chains summed: what one would do if one could list them."""
    policy, beta, right = Tabular(seed), 0.04, 4
    algorithm = exp_grpo(explanation_weight=beta, explanation_aggregation="sum")
    chains = [[first, second] for first in range(5) for second in range(5)]
    joint = torch.stack([policy.log_probs([[*chain, right]]).sum() for chain in chains])
    posterior = joint.detach().softmax(0)
    expected_loss = torch.zeros((), dtype=torch.float64)
    for chain, probability in zip(chains, posterior, strict=True):
        log_probs = policy.log_probs([[1, 1], [*chain, right]])
        terms = loss_of(
            algorithm,
            LossInputs(
                log_probs_T=log_probs,
                entropy_T=torch.zeros_like(log_probs),
                mask_T=torch.ones_like(log_probs),
                sequence_T=torch.tensor([0, 0, 1, 1, 1]),
                num_sequences=2,
                lengths_S=torch.tensor([2.0, 3.0], dtype=torch.float64),
                totals=totals_of(2.0, 1.0, 3.0, 1.0),
                kind_S=("answer", "explanation"),
                old_log_probs_T=log_probs.detach(),
                advantages_T=torch.tensor([0.0, 0.0, NAN, NAN, NAN], dtype=torch.float64),
            ),
        )
        expected_loss = expected_loss + probability * terms.loss
    (found,) = torch.autograd.grad(expected_loss, policy.logits, retain_graph=True)
    (wanted,) = torch.autograd.grad(-beta * joint.logsumexp(0), policy.logits)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-16)
    assert found.abs().max() > 1e-3
