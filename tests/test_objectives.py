"""What objectives see of a micro-batch, and how sequences with a masked middle are laid out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from expo_case import make_batch
from nft_case import nft

from megarl.algorithms.base import AlgorithmContext
from megarl.algorithms.grpo import Grpo
from megarl.algorithms.objective import BatchTotals, LossInputs, LossTerms, Objective, counted_alone, total
from megarl.config.algorithms import GrpoSettings
from megarl.config.parameter_sets import REFERENCE
from megarl.parallel.vocab import token_log_probs, vocabulary_shard
from megarl.policy.batch import Cut, apart, lay_out
from megarl.policy.losses import Facts, LossStage, joined
from megarl.records import Sequence, from_place

#: (group, whether it is an explanation, tokens)
LAYOUT = [(0, True, 3), (0, False, 4), (1, False, 2), (1, True, 1)]


def seen_by(objective: Objective, inputs: LossInputs) -> LossInputs:
    """What its loss was called with."""
    found: list[LossInputs] = []

    def loss(given: LossInputs) -> LossTerms:
        found.append(given)
        return LossTerms(given.log_probs_T.sum())

    total([replace(objective, loss=loss)], inputs)
    return found[0]


def unused(inputs: LossInputs) -> LossTerms:
    raise AssertionError(inputs)


def test_an_objective_counts_the_tokens_of_its_own_kinds_alone() -> None:
    whole = make_batch(LAYOUT)
    answers = seen_by(Objective(unused, kinds=frozenset({"answer"})), whole)
    assert answers.mask_T.tolist() == [0.0] * 3 + [1.0] * 6 + [0.0]
    assert answers.lengths_S.tolist() == [0.0, 4.0, 2.0, 0.0]
    assert (answers.totals.tokens, answers.totals.sequences) == (6.0, 2.0)
    explanations = seen_by(Objective(unused, kinds=frozenset({"explanation"})), whole)
    assert torch.equal(explanations.mask_T, 1 - answers.mask_T)
    assert (explanations.totals.tokens, explanations.totals.sequences) == (4.0, 2.0)
    everything = seen_by(Objective(unused), whole)
    assert everything.mask_T.tolist() == [1.0] * 10 and everything.totals.tokens == 10.0
    nothing = seen_by(Objective(unused, kinds=frozenset({"hint"})), whole)
    assert nothing.mask_T.sum() == 0 and nothing.totals == BatchTotals.of({})


def test_two_objectives_that_log_one_name_are_named() -> None:
    def critic(inputs: LossInputs) -> LossTerms:
        return LossTerms(inputs.log_probs_T.sum(), {"critic_loss": (inputs.log_probs_T.sum(), 1.0)})

    def actor(inputs: LossInputs) -> LossTerms:
        return LossTerms(inputs.log_probs_T.sum(), {"ratio": (inputs.log_probs_T.sum(), 1.0)})

    one, other = Objective(actor, kinds=frozenset({"answer"})), Objective(critic)
    whole = make_batch(LAYOUT)
    assert total((one, other), whole).means.keys() == {"ratio", "critic_loss"}
    with pytest.raises(ValueError) as raised:
        total((one, other, Objective(actor, kinds=frozenset({"text", "hint"}))), whole)
    here = test_two_objectives_that_log_one_name_are_named.__name__ + ".<locals>"
    assert str(raised.value) == (
        f"the objectives {here}.actor of answer and {here}.actor of hint, text both log 'ratio': "
        "give one of the two another name"
    )


def test_an_objective_sees_the_values_that_it_declares() -> None:
    whole = make_batch(LAYOUT)
    bare = seen_by(Objective(unused), whole)
    assert bare.advantages_T is bare.old_log_probs_T is bare.rollout_log_probs_T is None and not bare.log_probs_under_T
    full = seen_by(Objective(unused, advantages=True, old=True, under=(REFERENCE,)), whole)
    assert full.advantages_T is whole.advantages_T and full.old_log_probs_T is whole.old_log_probs_T
    assert full.under(REFERENCE) is whole.under(REFERENCE) and full.rollout_log_probs_T is None


def test_the_losses_of_a_pass_are_added_up() -> None:
    def mean(name: str) -> Callable[[LossInputs], LossTerms]:
        def loss(inputs: LossInputs) -> LossTerms:
            value = (inputs.mask_T * inputs.log_probs_T).sum()
            return LossTerms(value / inputs.totals.tokens, {name: (value.detach(), inputs.totals.tokens)})

        return loss

    whole = make_batch(LAYOUT)
    one = Objective(mean("own"), kinds=frozenset({"answer"}))
    other = Objective(mean("learned"), kinds=frozenset({"explanation"}))
    terms = total((one, other), whole)
    values = whole.log_probs_T.detach()
    own, learned = values[3:9].mean(), torch.cat([values[:3], values[9:]]).mean()
    assert terms.loss.item() == pytest.approx((own + learned).item(), rel=1e-14)
    assert {name: count for name, (_, count) in terms.means.items()} == {"own": 6.0, "learned": 4.0}
    (gradient,) = torch.autograd.grad(terms.loss, whole.log_probs_T)
    assert gradient.tolist() == pytest.approx([1 / 4] * 3 + [1 / 6] * 6 + [1 / 4], rel=1e-15)


def test_counted_tokens_alone() -> None:
    seen = Objective(unused, kinds=frozenset({"answer"}), under=(REFERENCE,)).seen(make_batch(LAYOUT))
    alone = counted_alone(seen)
    assert alone.mask_T.tolist() == [1.0] * 6 and alone.sequence_T.tolist() == [1] * 4 + [2] * 2
    assert torch.equal(alone.under(REFERENCE), seen.under(REFERENCE)[3:9])


# Sequences


def sequence(length: int, places: list[int], **fields: object) -> Sequence:
    tokens = np.arange(10, 10 + length, dtype=np.int32)
    return Sequence(tokens, np.array(places, np.int32), **fields)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("places", [[0, 1], [2, 2], [3, 2], [1, 5], [-1]])
def test_positions_that_nothing_predicts_or_that_are_no_places_are_refused(places: list[int]) -> None:
    with pytest.raises(ValueError, match="must ascend from 1 or more"):
        sequence(5, places)


def test_values_of_another_number_are_refused() -> None:
    with pytest.raises(ValueError, match="3 old_log_probs of 2 trained tokens"):
        sequence(5, [1, 3], old_log_probs=np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="1 teacher of 2 trained tokens"):
        sequence(5, [1, 3], log_probs_under={"teacher": np.zeros(1, np.float32)})


@pytest.mark.parametrize("packed", [True, False])
def test_rows_are_made_for_trained_positions_alone(packed: bool) -> None:
    """Also where context-parallel ranks share the sequences; each row predicts its token from the one before it."""
    made = [sequence(9, [2, 3, 7]), sequence(6, [1, 5], kind="explanation", advantages=np.ones(2, np.float32))]
    whole = lay_out(made, packed=packed)
    assert whole.targets.tolist() == [12, 13, 17, 11, 15]
    assert whole.tokens.reshape(-1)[whole.rows].tolist() == [11, 12, 16, 10, 14]
    assert (whole.sequence.tolist(), whole.lengths.tolist()) == ([0, 0, 0, 1, 1], [3.0, 2.0])
    assert whole.kinds == ("answer", "explanation") and whole.old_log_probs is None
    assert whole.advantages is not None and whole.advantages.isnan().tolist() == [True] * 3 + [False] * 2
    parts = [lay_out(made, packed=packed, cut=Cut(2, rank)) for rank in range(2)]
    targets = torch.zeros(5, dtype=torch.int64)
    for rank, part in enumerate(parts):
        targets[part.parts[rank]] = part.targets
        assert (part.tokens.reshape(-1)[part.rows] == part.targets - 1).all()
    assert targets.tolist() == whole.targets.tolist()


def test_the_temperature_of_a_row_is_its_sequences() -> None:
    same = [sequence(4, [1, 2], temperature=0.7), sequence(4, [3], temperature=0.7)]
    assert lay_out(same, packed=True).temperature == 0.7
    mixed = lay_out([*same, sequence(4, [1], temperature=1.3)], packed=True).temperature
    assert isinstance(mixed, torch.Tensor) and mixed.tolist() == [0.7, 0.7, 0.7, 1.3]


@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_a_row_is_bit_for_bit_what_it_is_where_all_have_its_temperature(entropy_gradient: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(12, 8, generator=generator), torch.randn(19, 8, generator=generator)
    targets, shard = torch.arange(12), vocabulary_shard(19, 19, 0, None)
    temperatures = torch.tensor([0.7, 1.3, 1.0], dtype=torch.float64).repeat(4)

    def run(temperature: float | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        leaf = hidden.clone().requires_grad_()
        log_probs, entropy = token_log_probs(
            leaf, weight, targets, shard, temperature=temperature, chunk=5, entropy_gradient=entropy_gradient
        )
        (log_probs.sum() + (entropy.sum() if entropy_gradient else 0.0)).backward()
        assert leaf.grad is not None
        return log_probs.detach(), entropy.detach(), leaf.grad

    mixed = run(temperatures)
    for place, temperature in enumerate((0.7, 1.3, 1.0)):
        for one, other in zip(mixed, run(temperature), strict=True):
            assert torch.equal(one[place::3], other[place::3])
    assert from_place(2, 5).tolist() == [2, 3, 4]


def test_what_a_pass_says_of_itself_is_no_objectives_to_say() -> None:
    assert joined({"entropy": 1.0}, {"ratio_mean": 2.0}) == {"entropy": 1.0, "ratio_mean": 2.0}
    with pytest.raises(ValueError, match="an objective logs 'entropy', as the pass itself does: give"):
        joined({"entropy": 1.0, "logprob_k3": 0.0}, {"entropy": 2.0})


def clipped() -> Objective:
    """GRPO's with every term that reads something of its own."""
    settings = GrpoSettings(
        kl_coefficient=0.1, entropy_coefficient=0.1, importance_cap=2.0, rejection_bounds=(0.5, 2.0)
    )
    return Grpo(settings, AlgorithmContext(max_tokens=64, group_size=4)).objectives[0]


@pytest.mark.parametrize("objective", [clipped, lambda: nft().objectives[0]], ids=["grpo", "nft"])
def test_nothing_is_read_from_the_device_before_a_pass_ends(objective: Callable[[], Objective]) -> None:
    """On a device without memory, which has nothing to read: one number that a GPU is asked for waits for all its
    work."""
    values = np.zeros(3, np.float32)
    under, signals = {REFERENCE: values}, {"reward": 1.0, "success_rate": 0.5, "prompt_weight": 1.0}
    made = [
        sequence(9, [2, 3, 7], advantages=values, rollout_log_probs=values, log_probs_under=under, signals=signals)
        for _ in range(2)
    ]
    counts, answers = BatchTotals.of({"answer": BatchTotals(6.0, 2.0)}), frozenset({"answer"})
    stage = LossStage([objective()], counts, Facts(answers, answers), old_is_current=True, keeps_old=True)
    batch = lay_out(made, packed=True, device="meta")
    log_probs = torch.zeros(6, device="meta", requires_grad=True)
    for _ in range(2):
        stage(batch, [0, 1], log_probs, torch.zeros(6, device="meta")).backward()
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        stage.hand_on(made)


def test_values_of_micro_batches_come_apart_by_sequence() -> None:
    parts = apart([torch.arange(3.0), torch.arange(3, 5, dtype=torch.bfloat16)], [1, 2, 2])
    assert [part.tolist() for part in parts] == [[0.0], [1.0, 2.0], [3.0, 4.0]]
    assert {part.dtype for part in parts} == {np.dtype(np.float32)} and apart([], []) == []
