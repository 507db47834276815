"""START: which tokens each stage trains, when the stages change, and what the loss makes of the parts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from group_case import group_of
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_case import double, logged_sums

from megarl.algorithms.base import AlgorithmContext, Group
from megarl.algorithms.grpo import Grpo
from megarl.algorithms.objective import BatchTotals, LossInputs
from megarl.algorithms.plan import Generation, Plan, Responder
from megarl.algorithms.start import Start
from megarl.config.algorithms import GrpoSettings, StartSettings
from megarl.config.load import load_config
from megarl.config.parameter_sets import REFERENCE
from megarl.config.rules import broken_rules

CONTEXT = AlgorithmContext(max_tokens=64, group_size=4)
EVERY_TERM: dict[str, Any] = {
    "dual_clip": 3.0,
    "kl_coefficient": 0.1,
    "entropy_coefficient": 0.05,
    "importance_cap": 1.2,
}
RESPONSE: dict[str, Any] = {"thinking_steps": 0, "second_stage": "response"}
FULL: dict[str, Any] = {"thinking_steps": 0, "second_stage": "full"}
LEVELS = ["token", "sequence"]
AGGREGATIONS = ["token_mean", "sequence_mean", "constant"]


def start(**chosen) -> Start:
    return Start(StartSettings(**chosen), CONTEXT)


def grpo(**chosen) -> Grpo:
    return Grpo(GrpoSettings(**chosen), CONTEXT)


#: One group: three outputs of thinking and response, and one that has no end of thinking.
GROUP = group_of((1.0, 0.25, 0.5, 0.0), (5, 4, 7, 6), (3, 1, 5, None), finished=(True, True, True, False))
WHOLE = group_of((1.0, 0.25, 0.5, 0.0), (5, 4, 7, 6), (3, 1, 5, 2), finished=(True, True, True, False))


def ends_of(group: Group) -> list[int | None]:
    """Where the thinking of each answer ends."""
    return [head.marks.get("thinking") for head in group.answers]


@dataclass(frozen=True)
class Toy:
    """The outputs of a group under a softmax model: a free row of logits for each token."""

    outcome: Group
    logits_TV: torch.Tensor
    tokens_T: torch.Tensor
    old_T: torch.Tensor
    reference_T: torch.Tensor

    @classmethod
    def of(cls, outcome: Group, seed: int = 0, spread: float = 0.4) -> Toy:
        generator = torch.Generator().manual_seed(seed)
        total = sum(outcome.lengths)
        logits_TV = torch.randn(total, 5, generator=generator, dtype=torch.float64)
        tokens_T = torch.randint(5, (total,), generator=generator)
        log_probs_T = logits_TV.log_softmax(1)[torch.arange(total), tokens_T]
        noise = torch.randn(2, total, generator=generator, dtype=torch.float64) * spread
        return cls(outcome, logits_TV.requires_grad_(), tokens_T, log_probs_T + noise[0], log_probs_T + noise[1])

    def positions(self, spans: list[tuple[int, int]]) -> torch.Tensor:
        """[T] bool: inside the span of its sample."""
        parts = [
            torch.tensor([first <= t < end for t in range(length)])
            for (first, end), length in zip(spans, self.outcome.lengths, strict=True)
        ]
        return torch.cat(parts)

    def thinking(self) -> torch.Tensor:
        """[T] bool: the token belongs to a thinking."""
        return self.positions([(0, z or 0) for z in ends_of(self.outcome)])

    def response(self) -> torch.Tensor:
        """[T] bool: the token belongs to a response."""
        pairs = zip(ends_of(self.outcome), self.outcome.lengths, strict=True)
        return self.positions([(0, 0) if z is None else (z, length) for z, length in pairs])

    def inputs(self, algorithm: Grpo) -> LossInputs:
        """What the loop makes of the group for the algorithm."""
        lengths, spans = self.outcome.lengths, algorithm.spans(1, self.outcome)
        log_probs_TV = self.logits_TV.log_softmax(1)
        sequence_T = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        trained = [end - first for first, end in spans]
        return LossInputs(
            log_probs_T=log_probs_TV[torch.arange(len(self.tokens_T)), self.tokens_T],
            entropy_T=-(log_probs_TV.exp() * log_probs_TV).sum(1),
            old_log_probs_T=self.old_T,
            rollout_log_probs_T=self.old_T + 0.1,
            log_probs_under_T={REFERENCE: self.reference_T},
            advantages_T=double(algorithm.advantages(self.outcome))[sequence_T],
            mask_T=self.positions(list(spans)).double(),
            sequence_T=sequence_T,
            num_sequences=len(lengths),
            lengths_S=double(trained),
            totals=BatchTotals(float(sum(trained)), float(sum(n > 0 for n in trained)), float(sum(lengths))),
        )

    def run(self, algorithm: Grpo):
        """Loss terms, and the loss's gradient in the logits."""
        terms = algorithm.loss(self.inputs(algorithm))
        return terms, torch.autograd.grad(terms.loss, self.logits_TV)[0]


# --- spans and stages ------------------------------------------------------------------------------------------------


def test_spans_of_each_stage():
    assert start().spans(1, GROUP) == ((0, 3), (0, 1), (0, 5), (0, 0))
    assert start(**RESPONSE).spans(1, GROUP) == ((3, 5), (1, 4), (5, 7), (0, 0))
    assert start(**FULL).spans(1, GROUP) == ((0, 5), (0, 4), (0, 7), (0, 6))


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(2, 50), st.floats(0, 1), st.booleans()), min_size=1, max_size=8))
def test_thinking_and_response_make_the_whole_output(drawn):
    lengths = tuple(length for length, _, _ in drawn)
    ends = tuple(max(1, round(share * (length - 1))) if formed else None for length, share, formed in drawn)
    group = group_of((0.5,) * len(drawn), lengths, ends)
    for length, end, first, second in zip(
        lengths, ends, start().spans(1, group), start(**RESPONSE).spans(1, group), strict=True
    ):
        assert (first, second) == (((0, end), (end, length)) if end else ((0, 0), (0, 0)))


def test_what_stage_1_asks_for():
    assert start().objectives[0].old and start().splits_thinking
    plain = Generation(CONTEXT.group_size)
    assert start().plan(1) == Plan((plain,))
    assert start(responder="initial").plan(1) == Plan((replace(plain, responder=Responder("reference", 1)),))
    assert start(responses=4).plan(1) == Plan((replace(plain, responder=Responder("policy", 4)),))
    assert start(kl_coefficient=0.1).objectives[0].under == (REFERENCE,)
    assert start(dynamic_sampling=True).plan(1).batches == 10


@pytest.mark.parametrize("second", ["response", "full"])
@pytest.mark.parametrize("last", [1, 3])
def test_the_stages_change_after_the_given_step(second, last):
    """Whatever was asked before: a continued run is in the stage of its step."""
    algorithm = start(thinking_steps=last, second_stage=second, responder="initial", responses=2)
    first_spans, second_spans = start().spans(1, GROUP), start(thinking_steps=0, second_stage=second).spans(1, GROUP)
    for step in (*range(1, 7), 100, 2):
        responder = Responder("reference", 2) if step <= last else None
        assert algorithm.spans(step, GROUP) == (first_spans if step <= last else second_spans)
        assert [one.responder for one in algorithm.plan(step).generations] == [responder]


def test_without_a_number_of_steps_stage_1_never_ends():
    algorithm = start(responder="initial")
    assert algorithm.spans(10**9, GROUP) == start().spans(1, GROUP)
    assert algorithm.plan(10**9) == algorithm.plan(1)


# --- S1 to S4: the loss of the parts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("aggregation", "normalizer"),
    [*((aggregation, "trained") for aggregation in AGGREGATIONS), ("token_mean", "response"), ("constant", "response")],
)
def test_s1_the_span_of_everything_is_grpo_bit_for_bit(level, aggregation, normalizer):
    chosen = {"ratio_level": level, "aggregation": aggregation, **EVERY_TERM}
    toy = Toy.of(GROUP)
    algorithm = start(normalizer=normalizer, **chosen, **FULL)
    found, found_grad = toy.run(algorithm)
    expected, expected_grad = toy.run(grpo(**chosen))
    assert found.loss.item() == expected.loss.item() != 0.0
    assert torch.equal(found_grad, expected_grad) and (found_grad.abs().sum(1) > 0).all()
    assert logged_sums(found) == logged_sums(expected)


def test_s1_groups_and_rewards_are_grpos():
    chosen = {"overlong_buffer": 62, "dynamic_sampling": True, "std_estimator": "sample"}
    mine, other = start(**chosen), grpo(**chosen)
    assert mine.shape_rewards(GROUP) == other.shape_rewards(GROUP) != GROUP.rewards
    assert mine.advantages(GROUP) == other.advantages(GROUP)
    assert mine.drop_reason(group_of((0.5,) * 4, GROUP.lengths)) == "groups_without_variance"


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("stage", [{}, RESPONSE])
def test_s1_the_span_of_nothing_has_no_gradient(level, aggregation, stage):
    """No output has an end of thinking."""
    toy = Toy.of(group_of(GROUP.rewards, GROUP.lengths))
    terms, gradient = toy.run(start(ratio_level=level, aggregation=aggregation, **EVERY_TERM, **stage))
    assert terms.loss.item() == 0.0
    assert gradient.count_nonzero() == 0


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_s2_each_stage_leaves_the_logits_of_the_other_part_alone(level, aggregation):
    """Through softmax, with every term of the loss; nothing at all moves where there is no end of thinking."""
    toy = Toy.of(GROUP)
    chosen = {"ratio_level": level, "aggregation": aggregation, **EVERY_TERM}
    for algorithm, trained_T in ((start(**chosen), toy.thinking()), (start(**chosen, **RESPONSE), toy.response())):
        _, gradient = toy.run(algorithm)
        assert gradient[~trained_T].count_nonzero() == 0
        assert (gradient[trained_T].abs().sum(1) > 0).all()
    assert not (toy.thinking() & toy.response()).any()
    assert (~toy.thinking() & ~toy.response()).sum() == 6


@pytest.mark.parametrize("aggregation", ["token_mean", "constant"])
@pytest.mark.parametrize("chosen", [{}, EVERY_TERM], ids=["plain", "every term"])
@pytest.mark.parametrize("seed", range(3))
def test_s3_thinking_and_response_add_up_with_one_normalizer(aggregation, chosen, seed):
    toy = Toy.of(WHOLE, seed)
    chosen = {"aggregation": aggregation, "normalizer": "response", **chosen}
    parts = [toy.run(start(**chosen, **stage)) for stage in ({}, RESPONSE)]
    whole, whole_grad = toy.run(start(**chosen, **FULL))
    torch.testing.assert_close(parts[0][0].loss + parts[1][0].loss, whole.loss, rtol=1e-14, atol=1e-16)
    torch.testing.assert_close(parts[0][1] + parts[1][1], whole_grad, rtol=1e-14, atol=1e-17)


def test_s3_fails_with_the_normalizer_of_the_trained_tokens():
    """Each part is then divided by its own count: 11 and 11 of 22 tokens, so the sum is twice the whole."""
    toy = Toy.of(WHOLE)
    parts = [toy.run(start(**stage))[1] for stage in ({}, RESPONSE)]
    whole = toy.run(start(**FULL))[1]
    torch.testing.assert_close(parts[0] + parts[1], 2 * whole, rtol=1e-14, atol=1e-17)
    assert whole.norm() > 0


def test_s3_outputs_without_a_response_count_in_the_normalizer_alone():
    toy = Toy.of(GROUP)
    parts = [toy.run(start(normalizer="response", **stage))[1] for stage in ({}, RESPONSE)]
    whole = toy.run(start(normalizer="response", **FULL))[1]
    formed_T = toy.thinking() | toy.response()
    torch.testing.assert_close((parts[0] + parts[1])[formed_T], whole[formed_T], rtol=1e-14, atol=1e-17)
    assert whole[~formed_T].count_nonzero() > 0


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), tails=st.lists(st.integers(1, 5), min_size=4, max_size=4))
def test_s4_other_response_tokens_do_not_change_the_loss_of_the_thinking(level, aggregation, seed, tails):
    """At the same thinking and rewards: other tokens, other log-probs, and also responses of other lengths."""
    toy = Toy.of(WHOLE, seed)
    algorithm = start(ratio_level=level, aggregation=aggregation, **EVERY_TERM)
    terms, gradient = toy.run(algorithm)
    ends = ends_of(WHOLE)
    other = Toy.of(
        group_of(WHOLE.rewards, [(z or 0) + tail for z, tail in zip(ends, tails, strict=True)], ends), seed + 1
    )
    mine_T, theirs_T = toy.thinking(), other.thinking()
    for name in ("tokens_T", "old_T", "reference_T"):
        getattr(other, name)[theirs_T] = getattr(toy, name)[mine_T]
    logits_TV = other.logits_TV.detach().clone()
    logits_TV[theirs_T] = toy.logits_TV.detach()[mine_T]
    other_terms, other_gradient = replace(other, logits_TV=logits_TV.requires_grad_()).run(algorithm)
    torch.testing.assert_close(other_terms.loss, terms.loss, rtol=1e-14, atol=1e-16)
    torch.testing.assert_close(other_gradient[theirs_T], gradient[mine_T], rtol=1e-14, atol=1e-17)
    assert logged_sums(other_terms).keys() == logged_sums(terms).keys()
    for name, value in logged_sums(terms).items():
        assert logged_sums(other_terms)[name].item() == pytest.approx(value.item(), rel=1e-13)


# --- refused runs ----------------------------------------------------------------------------------------------------

REFUSED = [
    (
        "reward.graded=whole",
        "reward.graded=whole: must be response: the reward may not see the thinking that it is to judge by its "
        "answer. Fix: set reward.graded=response.",
    ),
    (
        "algorithm.normalizer=response algorithm.aggregation=sequence_mean",
        "algorithm.normalizer=response with algorithm.aggregation=sequence_mean: has no one divisor for both parts of "
        "an output. Fix: use token_mean or constant, or algorithm.normalizer=trained.",
    ),
    (
        "algorithm.second_stage=full",
        "algorithm.second_stage=full: has no effect without algorithm.thinking_steps, since the whole run is stage 1. "
        "Fix: set algorithm.thinking_steps, or remove it.",
    ),
    *(
        (
            f"algorithm.thinking_steps=0 algorithm.{setting}",
            "algorithm.thinking_steps=0: leaves no stage 1 for algorithm.responder and algorithm.responses to work in. "
            "Fix: remove these two, or let stage 1 last longer.",
        )
        for setting in ("responder=initial", "responses=2")
    ),
    (
        "algorithm.aggregation_constant=64",
        "algorithm.aggregation_constant=64: has no effect with algorithm.aggregation=token_mean. "
        "Fix: set algorithm.aggregation=constant or remove it.",
    ),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED, ids=[overrides for overrides, _ in REFUSED])
def test_refused_runs(run_file: Path, overrides: str, message: str) -> None:
    config = load_config(run_file, ["algorithm=start", "reward.graded=response", *overrides.split()])
    assert [str(each) for each in broken_rules(config)] == [message]


@pytest.mark.parametrize(
    "overrides",
    [
        "",
        "algorithm.responder=initial algorithm.responses=4 algorithm.thinking_steps=2",
        "algorithm.thinking_steps=0 algorithm.second_stage=full",
        "algorithm.normalizer=response algorithm.aggregation=constant",
        "algorithm.aggregation=sequence_mean",
    ],
)
def test_allowed_runs(run_file: Path, overrides: str) -> None:
    config = load_config(run_file, ["algorithm=start", "reward.graded=response", *overrides.split()])
    assert list(broken_rules(config)) == []
