"""GRPO's loss: masks, micro-batches, the first on-policy update, GSPO's equations, extreme numbers."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_case import assert_micro_batches_add_up, by_sequence, constants_of, log_ratios, logged_sums, with_constants

from megarl.algorithms.base import AlgorithmContext
from megarl.algorithms.grpo import Grpo
from megarl.algorithms.objective import BatchTotals, LossInputs, required
from megarl.config.algorithms import GrpoSettings
from megarl.config.parameter_sets import REFERENCE

CONTEXT = AlgorithmContext(max_tokens=64, group_size=4)
EVERY_TERM = {
    "dual_clip": 3.0,
    "kl_coefficient": 0.1,
    "kl_kind": "k3+",
    "entropy_coefficient": 0.05,
    "importance_cap": 1.2,
    "importance_level": "sequence",
    "rejection_bounds": (0.9, 1.1),
    "rejection_level": "sequence_mean",
}
AGGREGATIONS = ["token_mean", "sequence_mean", "constant", "token_sum"]
LEVELS = ["token", "sequence"]


def grpo(**chosen) -> Grpo:
    return Grpo(GrpoSettings(**chosen), CONTEXT)


def make_batch(lengths=(4, 2, 6), seed=0) -> LossInputs:
    """A whole mini-batch, nothing masked; one advantage per sequence, alternating in sign."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.tensor(lengths)
    total = int(counts.sum())
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), counts)

    def normal():
        return torch.randn(total, generator=generator, dtype=torch.float64)

    old = -normal().abs() - 0.1
    log_probs = (old + 0.3 * normal()).requires_grad_()
    return LossInputs(
        log_probs_T=log_probs,
        entropy_T=normal().abs().requires_grad_(),
        old_log_probs_T=old,
        rollout_log_probs_T=old + 0.2 * normal(),
        log_probs_under_T={REFERENCE: old + 0.4 * normal()},
        advantages_T=torch.where(sequence % 2 == 0, 1.3, -0.8).double(),
        mask_T=torch.ones(total, dtype=torch.float64),
        sequence_T=sequence,
        num_sequences=len(lengths),
        lengths_S=counts.double(),
        totals=BatchTotals(tokens=float(total), sequences=float(len(lengths))),
    )


def advantages(inputs: LossInputs) -> torch.Tensor:
    return required(inputs.advantages_T, "advantages_T")


def loss_and_gradient(algorithm: Grpo, inputs: LossInputs):
    loss = algorithm.loss(inputs).loss
    return loss.detach(), torch.autograd.grad(loss, inputs.log_probs_T)[0]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("level", LEVELS)
@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=2, max_size=6),
    owners=st.lists(st.integers(0, 2), min_size=6, max_size=6),
    seed=st.integers(0, 1000),
)
def test_micro_batches_add_up_to_the_whole(aggregation, level, lengths, owners, seed):
    """However the sequences are spread over ranks and micro-batches."""
    whole = make_batch(lengths, seed)
    parts = by_sequence(whole, owners)
    assert_micro_batches_add_up(grpo(aggregation=aggregation, ratio_level=level, **EVERY_TERM), whole, parts)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("junk", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_masked_tokens_may_hold_anything(aggregation, level, junk):
    algorithm = grpo(aggregation=aggregation, ratio_level=level, **EVERY_TERM)
    clean = make_batch((4, 2, 6))
    masked = torch.tensor([0, 5, 9, 11])
    mask = clean.mask_T.index_fill(0, masked, 0.0)
    clean = replace(clean, mask_T=mask, lengths_S=torch.tensor([3.0, 1.0, 4.0]).double(), totals=BatchTotals(8.0, 3.0))
    spoilt = {name: value.detach().index_fill(0, masked, junk) for name, value in constants_of(clean).items()}
    log_probs = clean.log_probs_T.detach().index_fill(0, masked, junk).requires_grad_()
    dirty = replace(with_constants(clean, spoilt), log_probs_T=log_probs)

    clean_terms, dirty_terms = algorithm.loss(clean), algorithm.loss(dirty)
    clean_grad = torch.autograd.grad(clean_terms.loss, clean.log_probs_T)[0]
    dirty_grad = torch.autograd.grad(dirty_terms.loss, dirty.log_probs_T)[0]
    assert dirty_terms.loss.item() == clean_terms.loss.item()
    assert torch.equal(dirty_grad, clean_grad)
    assert dirty_grad[masked].tolist() == [0.0] * 4
    assert clean_grad.count_nonzero() >= 4
    assert logged_sums(dirty_terms) == logged_sums(clean_terms)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("totals", [BatchTotals(0.0, 0.0), BatchTotals(0.0, 3.0), BatchTotals(100.0, 20.0)])
def test_a_batch_without_counted_tokens_is_exactly_zero(aggregation, level, totals):
    inputs = make_batch((4, 2, 6))
    inputs = replace(inputs, mask_T=inputs.mask_T * 0, lengths_S=inputs.lengths_S * 0, totals=totals)
    algorithm = grpo(aggregation=aggregation, ratio_level=level, **EVERY_TERM)
    loss, gradient = loss_and_gradient(algorithm, inputs)
    assert loss.item() == 0.0
    assert gradient.tolist() == [0.0] * 12
    assert {value.item() for value in logged_sums(algorithm.loss(inputs)).values()} == {0.0}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("old", ["the same tensor", "a copy"])
def test_first_update_is_the_plain_policy_gradient(level, old):
    """While the weights are those of the rollouts: ratio 1, loss -mean A, gradient -A / N on each token."""
    inputs = make_batch((4, 2, 6))
    current = inputs.log_probs_T if old == "the same tensor" else inputs.log_probs_T.detach().clone()
    inputs = replace(inputs, old_log_probs_T=current)
    loss, gradient = loss_and_gradient(grpo(ratio_level=level), inputs)
    assert loss.item() == pytest.approx(-advantages(inputs).mean().item())
    torch.testing.assert_close(gradient, -advantages(inputs) / 12)
    sums = logged_sums(grpo(ratio_level=level).loss(inputs))
    assert [sums[name].item() for name in ("ratio_mean", "clip_share", "kl_old_k3")] == [12.0, 0.0, 0.0]


def test_first_update_corrects_for_the_engine():
    inputs = make_batch((4, 2, 6))
    inputs = replace(inputs, old_log_probs_T=inputs.log_probs_T)
    _, gradient = loss_and_gradient(grpo(importance_cap=1.1), inputs)
    weight = (inputs.log_probs_T.detach() - required(inputs.rollout_log_probs_T, "rollout_log_probs_T")).exp()
    weight = weight.clamp(max=1.1)
    torch.testing.assert_close(gradient, -advantages(inputs) * weight / 12)
    assert (weight == 1.1).any() and (weight < 1.0).any()


def test_importance_weight_leaves_kl_and_entropy_alone():
    inputs = replace(make_batch(), advantages_T=torch.zeros(12, dtype=torch.float64))
    terms = {"kl_coefficient": 0.1, "entropy_coefficient": 0.05}
    plain = loss_and_gradient(grpo(**terms), inputs)
    weighted = loss_and_gradient(grpo(**terms, importance_cap=0.5), inputs)
    assert plain[0] == weighted[0] != 0.0
    assert torch.equal(plain[1], weighted[1]) and plain[1].count_nonzero() == 12


def test_gspo_with_sequence_mean_is_equation_5():
    inputs = make_batch((4, 2, 6))
    low, high = 0.1, 0.05
    objective = torch.zeros((), dtype=torch.float64)
    for index, advantage in enumerate((1.3, -0.8, 1.3)):
        own = inputs.sequence_T == index
        ratio = log_ratios(inputs)[own].mean().exp()
        objective = objective + torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage) / 3
    algorithm = grpo(ratio_level="sequence", aggregation="sequence_mean", clip_low=low, clip_high=high)
    loss, gradient = loss_and_gradient(algorithm, inputs)
    torch.testing.assert_close(loss, -objective.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(-objective, inputs.log_probs_T)[0])
    assert gradient.count_nonzero() > 0


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_gspo_equals_its_token_form_for_one_advantage_per_sequence(aggregation):
    """Eq. 14 writes the ratio as sg[s] x p / sg[p] per token; both forms must give one gradient (their section 4.3)."""
    inputs = make_batch((4, 2, 6))
    _, gradient = loss_and_gradient(
        grpo(ratio_level="sequence", aggregation=aggregation, clip_low=0.9, clip_high=9.0), inputs
    )
    log_ratio = log_ratios(inputs).detach()
    means = torch.stack([log_ratio[inputs.sequence_T == s].mean() for s in range(3)])
    divisor = {
        "token_mean": torch.full((12,), 12.0),
        "sequence_mean": 3 * inputs.lengths_S[inputs.sequence_T],
        "constant": torch.full((12,), 3 * 64.0),
        "token_sum": torch.ones(12),
    }[aggregation]
    torch.testing.assert_close(gradient, -advantages(inputs) * means.exp()[inputs.sequence_T] / divisor)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("gap", [1e4, -1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_far_off_policy_stays_finite(level, gap, dtype):
    inputs = make_batch((4, 2, 6))
    cast = {name: value.detach().to(dtype) for name, value in constants_of(inputs).items()}
    log_probs = (cast["old_log_probs_T"] + gap).requires_grad_()
    masks = {"mask_T": inputs.mask_T.to(dtype), "lengths_S": inputs.lengths_S.to(dtype)}
    inputs = replace(with_constants(inputs, cast), log_probs_T=log_probs, **masks)
    loss, gradient = loss_and_gradient(grpo(ratio_level=level, **EVERY_TERM), inputs)
    assert loss.dtype == dtype and loss.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize(
    ("missing", "chosen"),
    [
        ("old_log_probs_T", {}),
        ("advantages_T", {}),
        ("rollout_log_probs_T", {"importance_cap": 2.0}),
        ("rollout_log_probs_T", {"rejection_bounds": (0.5, 2.0)}),
        ("log_probs_under_T", {"kl_coefficient": 0.1}),
    ],
)
def test_a_tensor_that_is_needed_and_missing_is_named(missing, chosen):
    nothing, said = ({}, r"log_probs_under_T\['reference'\]") if missing == "log_probs_under_T" else (None, missing)
    with pytest.raises(ValueError, match=f"LossInputs.{said} is None"):
        grpo(**chosen).loss(replace(make_batch(), **{missing: nothing}))


def test_what_is_not_needed_may_be_missing():
    inputs = replace(make_batch(), rollout_log_probs_T=None, log_probs_under_T={})
    assert grpo().loss(inputs).loss.item() == grpo().loss(make_batch()).loss.item()
