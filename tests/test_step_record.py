"""What a line of metrics.jsonl makes of a step's passes and seconds."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megarl.policy.losses import Pass
from megarl.policy.trained_set import StepResult
from megarl.train.measure import of_updates, put, time_shares

STEP = StepResult(grad_norm=2.0, lr=1e-3, skipped=False)


def a_pass(gap_max: float, **means: float) -> Pass:
    return Pass(1.5, means, gap_max, loss_seconds=0.5, real_tokens=6, computed_tokens=8)


def test_a_gap_is_only_said_of_what_was_compared() -> None:
    names = ("logprob_gap_mean", "logprob_gap_max", "logprob_k3")
    nothing = of_updates({"policy": [a_pass(0.0, entropy=1.0)]}, {"policy": [STEP]})
    assert {name: nothing[name] for name in names} == dict.fromkeys(names)
    compared = a_pass(0.25, logprob_gap_mean=0.125, logprob_k3=0.5)
    last = a_pass(0.125, logprob_gap_mean=0.375, logprob_k3=0.25)
    found = of_updates({"policy": [a_pass(0.0), compared, last]}, {"policy": 3 * [STEP]})
    assert [found[name] for name in names] == [0.25, 0.25, 0.375]
    assert of_updates({"policy": []}, {})["logprob_gap_max"] is None


def test_a_set_that_trains_beside_the_policy_has_numbers_of_its_own():
    passes = {"policy": [a_pass(0.0, entropy=1.0)], "shadow": [a_pass(0.0, entropy=3.0)]}
    found = of_updates(passes, {"policy": [STEP], "shadow": [STEP]})
    assert (found["entropy"], found["shadow/entropy"]) == (1.0, 3.0)
    assert found["shadow/grad_norm"] == found["grad_norm"] == STEP.grad_norm
    # All that was computed counts.
    alone = of_updates({"policy": [a_pass(0.0, entropy=1.0)]}, {"policy": [STEP]})
    assert found["tokens"] == 2 * alone["tokens"] and not any("/" in name for name in alone)


def test_a_pass_that_is_a_part_of_a_step_has_gradient_norms_of_its_own():
    rl, sft = replace(a_pass(0.0), grad_norms={"policy": 3.0}), replace(a_pass(0.0), grad_norms={"policy": 4.0})
    found = of_updates({"policy": [rl], "sft": [sft]}, {"policy": [STEP], "adapter": [STEP]})
    assert (found["grad_norm_policy"], found["sft/grad_norm_policy"]) == (3.0, 4.0)
    assert found["grad_norm"] == found["adapter/grad_norm"] == 2.0 and "sft/grad_norm" not in found


def test_no_number_of_a_step_takes_the_place_of_another() -> None:
    """Where an objective or a gauge has the name of one."""
    with pytest.raises(ValueError, match="a step has two numbers called 'grad_norm': an algorithm must log its own by"):
        of_updates({"policy": [a_pass(0.0, grad_norm=1.0)]}, {"policy": [STEP]})
    values = {"reward_mean": 0.5, "entropy": None}
    put(values, {"entropy": 1.0})
    assert values == {"reward_mean": 0.5, "entropy": 1.0}
    with pytest.raises(ValueError, match="'reward_mean'"):
        put(values, {"reward_mean": 2.0})


def test_every_kind_of_an_algorithms_own_texts_has_its_share_of_the_time() -> None:
    seconds = {"generate": 6.0, "update": 2.0, "push": 2.0}
    shares = time_shares(seconds, [a_pass(0.0), a_pass(0.0)], {"answer": 6, "explanation": 3, "critique": 1})
    assert shares == pytest.approx({"loss": 0.1, "explanations": 0.18, "critiques": 0.06})
    assert time_shares(seconds, [], {"answer": 6}) == {"loss": 0.0}
    assert time_shares(seconds, [], {}) == {"loss": 0.0}
