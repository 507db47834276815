"""ExP-DPO's loss is DPO's, with the explanation chosen and one of the policy's own answers rejected."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from expo_case import CONTEXT, NAN, assert_parts_add_up, gradients, is_target, logged, make_batch
from group_case import group_of
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_case import micro_batch
from torch import Tensor

from megarl.algorithms import ALGORITHMS, build
from megarl.algorithms.base import Group
from megarl.algorithms.expo import ExpDpo
from megarl.algorithms.objective import LossInputs
from megarl.config.algorithms import ALGORITHM_SETTINGS, ExpDpoSettings
from megarl.config.parameter_sets import REFERENCE

#: (group, whether it is a target, tokens): one rejected and one chosen answer per group.
PAIRS = [(7, False, 4), (7, True, 3), (2, True, 5), (2, False, 2), (9, False, 1), (9, True, 1)]


def exp_dpo(**chosen: Any) -> ExpDpo:
    return ExpDpo(ExpDpoSettings(**chosen), CONTEXT)


def test_the_table_has_it_and_it_asks_for_what_it_needs() -> None:
    assert ALGORITHMS["exp_dpo"] is ExpDpo and ALGORITHM_SETTINGS["exp_dpo"] is ExpDpoSettings
    (pairs,) = build(ExpDpoSettings(), CONTEXT).objectives
    assert pairs.together and pairs.kinds == {"answer", "explanation"} and pairs.under == (REFERENCE,)
    assert not (pairs.old or pairs.rollout or pairs.advantages)
    for mode, weights in (("iterative", "policy"), ("offline", "reference")):
        plan = exp_dpo(mode=mode).plan(1)
        assert [(one.kind, one.weights) for one in plan.generations] == [("answer", weights), ("explanation", weights)]


def pair_sums(inputs: LossInputs) -> list[tuple[float, float]]:
    """(D_chosen, D_rejected) of each group, token by token."""
    assert inputs.group_S is not None
    reference_T = inputs.under(REFERENCE)
    sums: dict[int, list[float]] = {int(group): [0.0, 0.0] for group in inputs.group_S}
    for t, sequence in enumerate(inputs.sequence_T.tolist()):
        if inputs.mask_T[t] > 0:
            difference = inputs.log_probs_T[t].item() - reference_T[t].item()
            sums[int(inputs.group_S[sequence])][0 if inputs.kind_S[sequence] == "explanation" else 1] += difference
    return [(chosen, rejected) for chosen, rejected in sums.values()]


@pytest.mark.parametrize("beta", [0.1, 1.0, 7.0])
@pytest.mark.parametrize("seed", range(3))
def test_dpo_against_its_formula(beta: float, seed: int) -> None:
    """Value and gradient of Eq. 7 with plain floats; d loss / d log p = -+ beta sigmoid(-margin) / pairs."""
    inputs = make_batch(PAIRS, seed)
    terms = exp_dpo(beta=beta).loss(inputs)
    margins = [beta * (chosen - rejected) for chosen, rejected in pair_sums(inputs)]
    assert terms.loss.item() == pytest.approx(sum(math.log1p(math.exp(-m)) for m in margins) / 3, rel=1e-13)
    slope = {group: beta / (1 + math.exp(m)) / 3 for group, m in zip((7, 2, 9), margins, strict=True)}
    signs = [(group, -1.0 if target else 1.0) for group, target, length in PAIRS for _ in range(length)]
    expected = [sign * slope[group] for group, sign in signs]
    assert gradients(terms, inputs)[0].tolist() == pytest.approx(expected, rel=1e-13)
    assert logged(terms) == pytest.approx(
        {
            "preference_accuracy": float(sum(m > 0 for m in margins)),
            "preference_margin": sum(margins),
            "explanation_nll": -inputs.log_probs_T[is_target(inputs)].sum().item(),
        },
        rel=1e-13,
    )
    counts = {name: count for name, (_, count) in terms.means.items()}
    assert counts == {"preference_accuracy": 3.0, "preference_margin": 3.0, "explanation_nll": 9.0}


def test_dpo_gradcheck() -> None:
    inputs = make_batch(PAIRS, 4)

    def loss(log_probs_T: Tensor) -> Tensor:
        return exp_dpo(beta=0.7).loss(replace(inputs, log_probs_T=log_probs_T)).loss

    assert torch.autograd.gradcheck(loss, (inputs.log_probs_T,))


def test_dpo_at_its_start_and_the_limits_of_beta() -> None:
    """Policy = reference: log 2, whatever beta. Small beta: loss - log 2 -> -beta x margin / 2, the likelihood ratio's
    gradient. Large beta: loss / beta -> the hinge max(0, D_rejected - D_chosen)."""
    inputs = make_batch(PAIRS, 5)
    start = replace(inputs, log_probs_under_T={REFERENCE: inputs.log_probs_T})
    for beta in (1e-3, 0.1, 50.0):
        terms = exp_dpo(beta=beta).loss(start)
        assert terms.loss.item() == pytest.approx(math.log(2), rel=1e-15)
        expected = (1 - 2 * is_target(inputs).double()) * beta / 6
        torch.testing.assert_close(gradients(terms, inputs)[0], expected, rtol=1e-14, atol=0.0)
        assert logged(terms)["preference_accuracy"] == 0.0
    differences = [chosen - rejected for chosen, rejected in pair_sums(inputs)]
    assert min(differences) < -0.1 and max(differences) > 0.1
    small = exp_dpo(beta=1e-6).loss(inputs).loss.item()
    assert (math.log(2) - small) / 1e-6 == pytest.approx(sum(differences) / 6, rel=1e-4)
    large = exp_dpo(beta=1e5).loss(inputs)
    assert large.loss.item() / 1e5 == pytest.approx(sum(max(0.0, -d) for d in differences) / 3, rel=1e-12)
    assert gradients(large, inputs)[0].isfinite().all()


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [5, 2, 0, 3, 1, 4]])
def test_dpo_masked_tokens_and_what_is_not_needed_reach_nothing(order: list[int]) -> None:
    inputs = micro_batch(make_batch(PAIRS, 6), order)
    masked = torch.tensor([int(torch.nonzero(inputs.sequence_T == order.index(whole))[1]) for whole in (0, 2)])
    counts = inputs.lengths_S - torch.bincount(inputs.sequence_T[masked], minlength=6)
    clean = replace(inputs, mask_T=inputs.mask_T.index_fill(0, masked, 0.0), lengths_S=counts)
    leaf = clean.log_probs_T.detach().index_fill(0, masked, NAN).requires_grad_()
    dirty = replace(
        clean,
        log_probs_T=leaf,
        log_probs_under_T={REFERENCE: clean.under(REFERENCE).index_fill(0, masked, NAN)},
        advantages_T=None,
        old_log_probs_T=None,
        rollout_log_probs_T=None,
    )
    one, other = exp_dpo().loss(clean), exp_dpo().loss(dirty)
    assert one.loss.item() == other.loss.item()
    assert logged(one) == logged(other)
    (gradient,) = torch.autograd.grad(other.loss, leaf)
    assert gradient[masked].tolist() == [0.0, 0.0]
    assert torch.equal(gradient, torch.autograd.grad(one.loss, clean.log_probs_T)[0])
    expected = sum(math.log1p(math.exp(-0.1 * (c - r))) for c, r in pair_sums(clean)) / 3
    assert one.loss.item() == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("members", [[0], [1], [0, 2], [0, 1, 2], [0, 1, 3]])
def test_dpo_names_a_pair_that_was_torn_apart(members: list[int]) -> None:
    with pytest.raises(ValueError, match="must share its micro-batch"):
        exp_dpo().loss(micro_batch(make_batch(PAIRS), members))


def test_dpo_names_a_second_answer_and_missing_inputs() -> None:
    with pytest.raises(ValueError, match="must share its micro-batch"):
        exp_dpo().loss(make_batch([(1, True, 2), (1, False, 2), (1, False, 3)]))
    missing = {
        "log_probs_under_T": ({}, r"log_probs_under_T\['reference'\] is None"),
        "kind_S": ((), "kind_S names 0 kinds of 6 sequences"),
        "group_S": (None, "group_S is None"),
    }
    for name, (nothing, said) in missing.items():
        with pytest.raises(ValueError, match=f"LossInputs.{said}"):
            exp_dpo().loss(replace(make_batch(PAIRS), **{name: nothing}))


def test_dpo_trains_one_answer_of_a_group() -> None:
    def trained(algorithm: ExpDpo, group: Group) -> list[tuple[str, int, int]]:
        """Kind, number and trained tokens of what is trained."""
        (credit,) = algorithm.credit(1, [group])
        assert (credit.left_out is None) == (len(credit.trained) == 2)
        return [(one.head.key.kind, one.head.key.number, one.tokens) for one in credit.trained]

    chosen = ("explanation", 0, 9)
    group = group_of((1.0, 0.25, 0.0, 0.0), (5, 6, 7, 8), explanations=[9])
    assert trained(exp_dpo(), group) == [("answer", 0, 5), chosen]
    assert trained(exp_dpo(rejected="wrong"), group) == [("answer", 2, 7), chosen]
    # An environment asked its own question: that answer is none to what the explanation answers.
    first, *others = group.heads
    elsewhere = replace(group, heads=(replace(first, prompt_length=3), *others))
    assert trained(exp_dpo(), elsewhere) == [("answer", 1, 6), chosen]
    right = group_of((1.0, 0.5), (5, 6), explanations=[9])
    assert trained(exp_dpo(), right) == [("answer", 0, 5), chosen]
    assert trained(exp_dpo(rejected="wrong"), right) == [chosen]
    low = ExpDpo(ExpDpoSettings(rejected="wrong"), replace(CONTEXT, reward_low=-1.0))
    assert trained(low, group_of((0.0, -1.0), (5, 6), explanations=[9])) == [("answer", 1, 6), chosen]


GROUPS = st.lists(
    st.tuples(st.integers(1, 5), st.integers(1, 5), st.booleans(), st.integers(0, 2)), min_size=1, max_size=6
)


def paired_layout(groups: list[tuple[int, int, bool, int]]) -> tuple[list[tuple[int, bool, int]], list[list[int]]]:
    """Sequences of pairs with these (lengths, order, owner), and the sequences of each of three owners."""
    layout, owned = [], [[], [], []]
    for group, (chosen, rejected, first, owner) in enumerate(groups):
        owned[owner] += [len(layout), len(layout) + 1]
        layout += [(group, True, chosen), (group, False, rejected)][:: 1 if first else -1]
    return layout, [members for members in owned if members]


@settings(max_examples=60, deadline=None)
@given(groups=GROUPS, seed=st.integers(0, 1000))
def test_exp_dpo_micro_batches_of_whole_pairs_add_up(groups: list[tuple[int, int, bool, int]], seed: int) -> None:
    layout, owned = paired_layout(groups)
    whole = make_batch(layout, seed)
    assert_parts_add_up(exp_dpo(beta=0.8), whole, [micro_batch(whole, members) for members in owned])
