"""Probability ratios between the policy and its old self. Log-probs are in nats."""

from __future__ import annotations

import torch
from torch import Tensor

from megarl.ops.segments import sum_by_sequence


def token_ratio(log_ratio_T: Tensor, clamp: float) -> Tensor:
    """exp of the log-ratio clamped to plus/minus `clamp`; beyond it the gradient is zero. Shapes [T]."""
    return log_ratio_T.clamp(-clamp, clamp).exp()


def sequence_ratio(log_ratio_T: Tensor, sequence_T: Tensor, lengths_S: Tensor, clamp: float) -> Tensor:
    """The length-normalised sequence ratio s = exp(mean log-ratio) at each token, GSPO (2507.18071) Eq. 7.

    The gradient flows through s itself (Eq. 5 to 7), so each token of a sequence receives 1/length of the
    gradient that all tokens of the sequence send to s.

    Args:
        log_ratio_T: [T], 0 at masked tokens.
        sequence_T: [T] int64, the token's sequence.
        lengths_S: [S] counted tokens of each sequence; 0 allowed where nothing counts.
        clamp: bound on the mean log-ratio; beyond it the gradient is zero.

    Returns:
        [T].
    """
    sums_S = sum_by_sequence(log_ratio_T, sequence_T, lengths_S.shape[0])
    # An empty sequence must not divide by 0: its gradient would be 0 x inf.
    mean_S = sums_S / lengths_S.clamp(min=1.0)
    return mean_S.clamp(-clamp, clamp).exp()[sequence_T]


def k3_from_log_ratio(log_ratio_T: Tensor) -> Tensor:
    """exp(x) - 1 - x per token: with x = log(p/q) and samples from q, an unbiased estimate >= 0 of KL(q || p)."""
    # expm1 keeps the digits of small x, where exp(x) - 1 cancels.
    return torch.expm1(log_ratio_T) - log_ratio_T
