"""NFT's implicit negative policy (2505.18116): what is left of the old policy without its right answers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ImplicitNegative:
    """The ratio of the implicit negative policy to the old policy at each token, bounded from below."""

    log_ratios_T: Tensor
    """[T] log max_v(x, epsilon), with gradient."""
    ratios_T: Tensor
    """[T] max(x, epsilon), without gradient."""
    floored_T: Tensor
    """[T] bool: x < epsilon, where the value stands still and the gradient does not."""


def implicit_negative(log_ratio_T: Tensor, success_rate_T: Tensor, epsilon: float) -> ImplicitNegative:
    """log max_v((1 - r R) / (1 - r), epsilon) with max_v(x, e) = sg[max(x, e) - x] + x, NFT Eq. 10.

    With x the fraction, the gradient in log R is -(r / (1 - r)) R / max(x, epsilon) on both sides of the bound, also
    where x is negative, R > 1 / r: wrong answers that became likely keep being pushed down.

    Args:
        log_ratio_T: [T] log R, the policy in training over the old one, in nats; bounded above, so that exp is finite.
        success_rate_T: [T] r, the prompt's success rate, inside (0, 1); a constant.
        epsilon: the bound, above 0.
    """
    odds_T = success_rate_T / (1.0 - success_rate_T)
    ratio_T = log_ratio_T.exp()
    # expm1 keeps the digits of x beside R = 1; its derivative, computed as expm1 + 1, loses them where R is small.
    x_T = 1.0 - odds_T * torch.expm1(log_ratio_T.detach())
    ratios_T = x_T.clamp(min=epsilon)
    # The difference is exactly 0 and carries x's gradient. Written as (max - x) + x, the bound would be rounded away
    # next to a large x.
    straight_through_T = ratios_T + odds_T * (ratio_T.detach() - ratio_T)
    return ImplicitNegative(straight_through_T.log(), ratios_T, x_T < epsilon)
