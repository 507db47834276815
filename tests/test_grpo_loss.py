"""GRPO's loss: value and gradient of every setting against a reference written token by token with plain floats."""

import math
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_case import logged_sums

from megarl.algorithms.base import AlgorithmContext
from megarl.algorithms.grpo import Grpo
from megarl.algorithms.objective import BatchTotals, LossInputs
from megarl.config.algorithms import GroupRelativeSettings, GrpoSettings
from megarl.config.parameter_sets import REFERENCE

CONTEXT = AlgorithmContext(max_tokens=64, group_size=4)
PER_TOKEN = (
    "log_probs_T",
    "entropy_T",
    "old_log_probs_T",
    "rollout_log_probs_T",
    "advantages_T",
)
TERMS = {"kl_coefficient": 0.1, "entropy_coefficient": 0.05}
ALL_ON = {**TERMS, "dual_clip": 3.0, "importance_cap": 1.2}


def grpo(**chosen) -> Grpo:
    return Grpo(GrpoSettings(**chosen), CONTEXT)


def double(values, grad=False):
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


def make_batch(seed: int, lengths=(5, 1, 7, 0, 3), masked_share=0.25, spread=0.5) -> LossInputs:
    """Sequences with masked tokens between; log-ratios reach every clip region, a few of them every clamp."""
    draw = random.Random(seed)
    sequence = [index for index, length in enumerate(lengths) for _ in range(length)]
    mask = [float(draw.random() >= masked_share) for _ in sequence]
    old = [-draw.uniform(0.01, 4.0) for _ in sequence]
    jumps = [draw.choice([0.0, 0.0, 0.0, 0.0, 2.0, -2.0, 9.0]) for _ in sequence]
    log_probs = [x + draw.gauss(0.0, spread) + jump for x, jump in zip(old, jumps, strict=True)]
    counts = [sum(m for m, s in zip(mask, sequence, strict=True) if s == index) for index in range(len(lengths))]
    return LossInputs(
        log_probs_T=double(log_probs, grad=True),
        entropy_T=double([draw.uniform(0.0, 3.0) for _ in sequence], grad=True),
        old_log_probs_T=double(old),
        rollout_log_probs_T=double([x + draw.gauss(0.0, 0.3) for x in old]),
        log_probs_under_T={REFERENCE: double([x + draw.gauss(0.0, 0.7) for x in log_probs])},
        advantages_T=double([draw.choice([-1.7, -0.4, 0.0, 0.6, 2.1]) for _ in sequence]),
        mask_T=double(mask),
        sequence_T=torch.tensor(sequence, dtype=torch.int64),
        num_sequences=len(lengths),
        lengths_S=double(counts),
        totals=BatchTotals(tokens=sum(mask), sequences=float(len(lengths))),
    )


def gradients(algorithm: Grpo, inputs: LossInputs):
    """Loss terms, d loss / d log-probs, d loss / d entropy (0 where it is not part of the loss)."""
    terms = algorithm.loss(inputs)
    found = torch.autograd.grad(terms.loss, (inputs.log_probs_T, inputs.entropy_T), allow_unused=True)
    return terms, found[0], torch.zeros_like(inputs.entropy_T) if found[1] is None else found[1]


def reference_kl(s: GroupRelativeSettings, d: float) -> tuple[float, float]:
    """Estimate and its derivative in the policy's log-prob, at d = log policy - log reference."""
    if s.kl_kind in ("k1", "k1+"):
        value, slope = d, 1.0
    elif s.kl_kind == "k2":
        value, slope = d * d / 2, d
    elif abs(d) > s.log_ratio_clamp:
        bound = math.copysign(s.log_ratio_clamp, d)
        value, slope = math.exp(-bound) - 1 + bound, 0.0
    else:
        value, slope = math.exp(-d) - 1 + d, 1 - math.exp(-d)
    if s.kl_kind.endswith("+"):
        slope = d
    if s.kl_cap is not None and abs(value) > s.kl_cap:
        return math.copysign(s.kl_cap, value), 0.0
    return value, slope


def reference_objective(s: GroupRelativeSettings, ratio: float, advantage: float) -> tuple[float, float, bool, bool]:
    """Objective, its derivative in the ratio, clipped, dual-clipped."""
    if advantage > 0 and ratio > 1 + s.clip_high:
        return (1 + s.clip_high) * advantage, 0.0, True, False
    if advantage < 0 and ratio < 1 - s.clip_low:
        return (1 - s.clip_low) * advantage, 0.0, True, False
    if advantage < 0 and s.dual_clip is not None and ratio > s.dual_clip:
        return s.dual_clip * advantage, 0.0, False, True
    return ratio * advantage, advantage, False, False


def reference_weight(s: GroupRelativeSettings, token: float, product: float) -> tuple[float, bool]:
    """The importance weight of a token with this ratio, in an answer with this product of ratios; whether a bound
    changed it."""
    if s.importance_cap is None:
        return 1.0, False
    ratio = token if s.importance_level == "token" else product
    if (s.importance_floor or 0.0) <= ratio <= s.importance_cap:
        return ratio, False
    if s.importance_mode == "mask":
        return 0.0, True
    return s.importance_cap if ratio > s.importance_cap else s.importance_floor or 0.0, True


def reference_rejected(s: GroupRelativeSettings, token: float, answer: list[float]) -> bool:
    if s.rejection_bounds is None:
        return False
    low, high = s.rejection_bounds
    compared = {
        "token": [token],
        "sequence": [math.prod(answer)],
        "sequence_mean": [math.prod(answer) ** (1 / len(answer))],
        "sequence_any": answer,
    }[s.rejection_level]
    return any(not low <= ratio <= high for ratio in compared)


def reference_loss(s: GroupRelativeSettings, b: LossInputs):
    """The mini-batch's loss, its gradients in log-probs and entropies, and the logged sums."""
    lp, entropy, old, rollout, adv = (getattr(b, name).tolist() for name in PER_TOKEN)
    ref = b.under(REFERENCE).tolist()
    tokens = [t for t, m in enumerate(b.mask_T.tolist()) if m == 1.0]
    members = {i: [t for t in tokens if b.sequence_T[t] == i] for i in range(b.num_sequences)}
    loss, grad_lp, grad_entropy = 0.0, [0.0] * len(lp), [0.0] * len(lp)
    switched = {
        "dual_clip_share": s.dual_clip is not None,
        "importance_weight_mean": s.importance_cap is not None,
        "importance_bound_share": s.importance_cap is not None,
        "rejected_share": s.rejection_bounds is not None,
        "reference_kl": s.kl_coefficient > 0,
    }
    names = ["ratio_mean", "clip_share", "kl_old_k3", *(name for name, on in switched.items() if on)]
    sums = dict.fromkeys(names, 0.0)
    for t in tokens:
        own = members[int(b.sequence_T[t])]
        averaged = own if s.ratio_level == "sequence" else [t]
        x = sum(lp[u] - old[u] for u in averaged) / len(averaged)
        ratio = math.exp(min(max(x, -s.log_ratio_clamp), s.log_ratio_clamp))
        value, slope, clipped, dual_clipped = reference_objective(s, ratio, adv[t])
        engine = [math.exp(old[u] - rollout[u]) for u in own]
        trust, bounded = reference_weight(s, math.exp(old[t] - rollout[t]), math.prod(engine))
        rejected = reference_rejected(s, math.exp(old[t] - rollout[t]), engine)
        divisor = {
            "token_mean": len(tokens),
            "sequence_mean": len(own) * b.num_sequences,
            "constant": b.num_sequences * (s.aggregation_constant or CONTEXT.max_tokens),
            "token_sum": 1.0,
        }[s.aggregation]
        kl, kl_slope = reference_kl(s, lp[t] - ref[t])
        if not rejected:
            loss += (-trust * value + s.kl_coefficient * kl - s.entropy_coefficient * entropy[t]) / divisor
            if abs(x) <= s.log_ratio_clamp:
                for u in averaged:
                    grad_lp[u] -= trust * slope * ratio / len(averaged) / divisor
            grad_lp[t] += s.kl_coefficient * kl_slope / divisor
            grad_entropy[t] -= s.entropy_coefficient / divisor
        y = min(max(lp[t] - old[t], -s.log_ratio_clamp), s.log_ratio_clamp)
        logged = {
            "ratio_mean": ratio,
            "clip_share": clipped,
            "kl_old_k3": math.exp(y) - 1 - y,
            "dual_clip_share": dual_clipped,
            "importance_weight_mean": trust,
            "importance_bound_share": bounded,
            "rejected_share": rejected,
            "reference_kl": kl,
        }
        for name in names:
            sums[name] += logged[name]
    return loss, double(grad_lp), double(grad_entropy), sums


def assert_matches_reference(algorithm: Grpo, inputs: LossInputs) -> None:
    terms, grad_lp, grad_entropy = gradients(algorithm, inputs)
    loss, expected_lp, expected_entropy, sums = reference_loss(algorithm.settings, inputs)
    scale = 1.0 + expected_lp.norm().item()
    assert terms.loss.item() == pytest.approx(loss, rel=1e-11, abs=1e-12)
    torch.testing.assert_close(grad_lp, expected_lp, rtol=1e-11, atol=1e-13 * scale)
    torch.testing.assert_close(grad_entropy, expected_entropy, rtol=1e-12, atol=1e-15)
    logged = {name: value.item() for name, value in logged_sums(terms).items()}
    assert logged == pytest.approx(sums, rel=1e-11, abs=1e-12)


SINGLE_SETTINGS = [
    {},
    {"aggregation": "sequence_mean"},
    {"aggregation": "constant"},
    {"aggregation": "constant", "aggregation_constant": 10.0},
    {"clip_low": 0.0, "clip_high": 0.0},
    {"clip_high": 0.28},
    {"clip_low": 0.9, "clip_high": 5.0},
    {"dual_clip": 3.0},
    {"dual_clip": 1.1},
    {"ratio_level": "sequence"},
    {"ratio_level": "sequence", "aggregation": "sequence_mean", "clip_low": 3e-4, "clip_high": 4e-4},
    {"log_ratio_clamp": 1.0, "clip_high": 10.0},
    {"ratio_level": "sequence", "log_ratio_clamp": 0.3, "clip_high": 10.0},
    {"kl_coefficient": 0.1, "kl_kind": "k1"},
    {"kl_coefficient": 0.1, "kl_kind": "k2"},
    {"kl_coefficient": 0.1, "kl_kind": "k3"},
    {"kl_coefficient": 0.1, "kl_kind": "k1", "kl_cap": 0.3},
    {"kl_coefficient": 0.1, "kl_kind": "k2", "kl_cap": 0.1},
    {"kl_coefficient": 0.1, "kl_kind": "k3", "kl_cap": 0.1},
    {"kl_coefficient": 0.1, "kl_kind": "k3", "log_ratio_clamp": 0.4},
    {"entropy_coefficient": 0.05},
    {"entropy_coefficient": -0.05, "aggregation": "sequence_mean"},
    {"importance_cap": 1.2},
    {"importance_cap": 1.2, "importance_floor": 0.8},
    {"importance_cap": 1.2, "importance_floor": 0.8, "importance_mode": "mask"},
    {"importance_cap": 1.1, "importance_level": "sequence"},
    {"importance_cap": 1.4, "importance_level": "sequence", "importance_mode": "mask", "ratio_level": "sequence"},
    {"rejection_bounds": (0.9, 1.2), **TERMS},
    {"rejection_bounds": (0.9, 1.2), "rejection_level": "sequence", **TERMS},
    {"rejection_bounds": (0.95, 1.1), "rejection_level": "sequence_mean", "ratio_level": "sequence", **TERMS},
    {"rejection_bounds": (0.7, 1.6), "rejection_level": "sequence_any", "importance_cap": 1.2, **TERMS},
    {"kl_coefficient": 0.1, "kl_kind": "k1+"},
    {"kl_coefficient": 0.1, "kl_kind": "k3+"},
    {"kl_coefficient": 0.1, "kl_kind": "k3+", "kl_cap": 0.1},
    {"aggregation": "token_sum", **TERMS},
    {**ALL_ON, "aggregation": "constant", "ratio_level": "sequence"},
]


@pytest.mark.parametrize("chosen", SINGLE_SETTINGS, ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_each_setting_against_the_reference(chosen, seed):
    assert_matches_reference(grpo(**chosen), make_batch(seed))


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5),
    masked_share=st.sampled_from([0.0, 0.3, 0.9]),
    chosen=st.fixed_dictionaries(
        {},
        optional={
            "aggregation": st.sampled_from(["token_mean", "sequence_mean", "constant", "token_sum"]),
            "aggregation_constant": st.floats(0.5, 100),
            "clip_low": st.floats(0, 0.9),
            "clip_high": st.floats(0, 3),
            "dual_clip": st.floats(1.01, 5),
            "ratio_level": st.sampled_from(["token", "sequence"]),
            "log_ratio_clamp": st.floats(0.3, 20),
            "kl_coefficient": st.floats(0, 1),
            "kl_kind": st.sampled_from(["k1", "k2", "k3", "k1+", "k3+"]),
            "kl_cap": st.floats(0.05, 5),
            "entropy_coefficient": st.floats(-0.1, 0.1),
            "importance_cap": st.floats(0.5, 3),
            "importance_floor": st.floats(0.1, 0.5),
            "importance_level": st.sampled_from(["token", "sequence"]),
            "importance_mode": st.sampled_from(["truncate", "mask"]),
            "rejection_bounds": st.tuples(st.floats(0.3, 1), st.floats(1.01, 3)),
            "rejection_level": st.sampled_from(["token", "sequence", "sequence_mean", "sequence_any"]),
        },
    ),
)
def test_all_settings_together_against_the_reference(seed, lengths, masked_share, chosen):
    assert_matches_reference(grpo(**chosen), make_batch(seed, lengths, masked_share))


@pytest.mark.parametrize(
    "chosen",
    [
        {"clip_low": 0.99, "clip_high": 1e6},
        {"clip_low": 0.99, "clip_high": 1e6, "ratio_level": "sequence", "aggregation": "sequence_mean"},
        {"clip_low": 0.99, "clip_high": 1e6, "kl_coefficient": 0.3, "kl_kind": "k3", "entropy_coefficient": 0.1},
        {"clip_low": 0.99, "clip_high": 1e6, "kl_coefficient": 0.3, "kl_kind": "k2", "importance_cap": 1.1},
    ],
    ids=str,
)
def test_gradcheck_where_smooth(chosen):
    algorithm, inputs = grpo(**chosen), make_batch(3)
    # Near the old log-probs: no ratio reaches a clip, no estimate a clamp.
    log_probs = double([x + 0.3 * (-1) ** t for t, x in enumerate(inputs.log_probs_T.tolist())], grad=True)
    inputs = replace(inputs, old_log_probs_T=inputs.log_probs_T.detach())

    def loss(log_probs_T, entropy_T):
        return algorithm.loss(replace(inputs, log_probs_T=log_probs_T, entropy_T=entropy_T)).loss

    assert torch.autograd.gradcheck(loss, (log_probs, inputs.entropy_T))


def test_worked_example():
    """Four tokens in two sequences; every number below by hand."""
    inputs = LossInputs(
        log_probs_T=double([math.log(0.6), math.log(0.1), math.log(0.2), math.log(0.9)], grad=True),
        entropy_T=double([0.1, 0.2, 0.3, 0.4], grad=True),
        old_log_probs_T=double([math.log(0.4), math.log(0.1), math.log(0.4), math.log(0.3)]),
        advantages_T=double([1.0, 1.0, -2.0, -2.0]),
        mask_T=double([1.0] * 4),
        sequence_T=torch.tensor([0, 0, 1, 1]),
        num_sequences=2,
        lengths_S=double([2.0, 2.0]),
        totals=BatchTotals(tokens=4.0, sequences=2.0),
    )
    # ratios 1.5, 1, 0.5, 3: clipped above, inside, clipped below, not clipped on the bad side
    terms, grad, _ = gradients(grpo(), inputs)
    assert terms.loss.item() == pytest.approx(-(1.2 + 1.0 - 1.6 - 6.0) / 4)
    assert grad.tolist() == pytest.approx([0.0, -0.25, 0.0, 1.5])
    assert logged_sums(terms)["clip_share"].item() == 2.0
    assert logged_sums(terms)["ratio_mean"].item() == pytest.approx(6.0)
    terms, grad, _ = gradients(grpo(dual_clip=2.5), inputs)
    assert terms.loss.item() == pytest.approx(-(1.2 + 1.0 - 1.6 - 5.0) / 4)
    assert grad.tolist() == pytest.approx([0.0, -0.25, 0.0, 0.0])
    assert logged_sums(terms)["dual_clip_share"].item() == 1.0
