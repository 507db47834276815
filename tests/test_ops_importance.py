"""Importance weights and rejection by the ratio of trainer and engine, worked out by hand."""

import math

import pytest
import torch

from megarl.ops.importance import importance_weights, rejected_tokens

#: Three sequences of tokens with these ratios: their products are 3, 1.2 and 0.2; the last one is alone.
RATIOS = ((4.0, 0.5, 1.5), (0.4, 3.0), (0.2,))
SEQUENCE = torch.tensor([0, 0, 0, 1, 1, 2])


def log_ratios(grad: bool = False) -> torch.Tensor:
    values = [math.log(ratio) for ratios in RATIOS for ratio in ratios]
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


@pytest.mark.parametrize(
    ("level", "mode", "floor", "cap", "weights", "bounded"),
    [
        ("token", "truncate", None, 2.0, [2.0, 0.5, 1.5, 0.4, 2.0, 0.2], [1, 0, 0, 0, 1, 0]),
        ("token", "truncate", 0.45, 2.0, [2.0, 0.5, 1.5, 0.45, 2.0, 0.45], [1, 0, 0, 1, 1, 1]),
        ("token", "mask", None, 2.0, [0.0, 0.5, 1.5, 0.4, 0.0, 0.2], [1, 0, 0, 0, 1, 0]),
        ("token", "mask", 0.45, 2.0, [0.0, 0.5, 1.5, 0.0, 0.0, 0.0], [1, 0, 0, 1, 1, 1]),
        ("sequence", "truncate", None, 2.0, [2.0, 2.0, 2.0, 1.2, 1.2, 0.2], [1, 1, 1, 0, 0, 0]),
        ("sequence", "truncate", 0.3, 5.0, [3.0, 3.0, 3.0, 1.2, 1.2, 0.3], [0, 0, 0, 0, 0, 1]),
        ("sequence", "mask", None, 2.0, [0.0, 0.0, 0.0, 1.2, 1.2, 0.2], [1, 1, 1, 0, 0, 0]),
        ("sequence", "mask", 0.3, 5.0, [3.0, 3.0, 3.0, 1.2, 1.2, 0.0], [0, 0, 0, 0, 0, 1]),
    ],
)
def test_weights(level, mode, floor, cap, weights, bounded):
    found = importance_weights(log_ratios(grad=True), SEQUENCE, 3, level, mode, floor, cap)
    assert found.values_T.tolist() == pytest.approx(weights, rel=1e-14)
    assert found.bounded_T.tolist() == [bool(b) for b in bounded]
    assert not found.values_T.requires_grad


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(("mode", "beyond"), [("truncate", 2.0), ("mask", 0.0)])
def test_far_ratios_stay_finite(level, mode, beyond):
    log_ratio = torch.tensor([5000.0, -5000.0])
    found = importance_weights(log_ratio, torch.tensor([0, 1]), 2, level, mode, None, 2.0)
    assert found.values_T.tolist() == [beyond, 0.0]
    assert found.bounded_T.tolist() == [True, False]


@pytest.mark.parametrize(
    ("level", "low", "high", "rejected"),
    [
        ("token", 0.45, 2.0, [1, 0, 0, 1, 1, 1]),
        ("sequence", 0.25, 2.0, [1, 1, 1, 0, 0, 1]),
        ("sequence", 0.1, 4.0, [0, 0, 0, 0, 0, 0]),
        # The means are 3^(1/3) = 1.442, 1.2^(1/2) = 1.095 and 0.2.
        ("sequence_mean", 0.1, 1.44, [1, 1, 1, 0, 0, 0]),
        ("sequence_mean", 0.25, 1.45, [0, 0, 0, 0, 0, 1]),
        ("sequence_any", 0.3, 3.5, [1, 1, 1, 0, 0, 1]),
        ("sequence_any", 0.1, 3.5, [1, 1, 1, 0, 0, 0]),
        ("sequence_any", 0.1, 5.0, [0, 0, 0, 0, 0, 0]),
    ],
)
def test_rejection(level, low, high, rejected):
    lengths = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    found = rejected_tokens(log_ratios(), SEQUENCE, lengths, level, low, high)
    assert found.tolist() == [bool(r) for r in rejected]


@pytest.mark.parametrize("level", ["token", "sequence", "sequence_mean", "sequence_any"])
def test_nothing_is_rejected_where_trainer_and_engine_agree(level):
    """On the bounds themselves, and in a sequence without counted tokens."""
    found = rejected_tokens(torch.zeros(3), torch.tensor([0, 0, 1]), torch.tensor([2.0, 0.0]), level, 1.0, 1.001)
    assert found.tolist() == [False] * 3
