"""Per-token estimators of KL(policy || reference) from samples of the policy.

Names after Schulman's note "Approximating KL divergence": with d = log policy - log reference,
k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d (the one in GRPO, 2402.03300 Eq. 4). k1+ and k3+ have the value of k1 and k3
and the gradient of k2.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from megarl.ops.ratios import k3_from_log_ratio

KlKind = Literal["k1", "k2", "k3", "k1+", "k3+"]


def kl_estimate(
    log_probs_T: Tensor, reference_log_probs_T: Tensor, kind: KlKind, log_ratio_clamp: float, cap: float | None
) -> Tensor:
    """The estimate at each token, differentiable in `log_probs_T`; shapes [T], nats.

    In a loss the gradients' expectations over the policy's own samples differ from those of the values: k1 gives 0,
    k2 the gradient of KL(policy || reference), k3 that of KL(reference || policy). k1 and k3 estimate KL(policy ||
    reference) without bias in value, k2 in gradient: k1+ and k3+ in both.

    Args:
        log_probs_T: the policy's.
        reference_log_probs_T: the reference's; a constant.
        kind: the estimator.
        log_ratio_clamp: bound on d before k3's exp; k3's gradient is zero beyond it. k1 and k2 have no exp.
        cap: bound on the estimate's magnitude (k1 can be negative), zero gradient beyond; None for none.
    """
    difference_T = log_probs_T - reference_log_probs_T.detach()
    if kind == "k2":
        estimate_T = 0.5 * difference_T.square()
    elif kind in ("k1", "k1+"):
        estimate_T = difference_T
    else:
        estimate_T = k3_from_log_ratio(-difference_T.clamp(-log_ratio_clamp, log_ratio_clamp))
    if kind in ("k1+", "k3+"):
        # The second term is exactly 0 and carries k2's gradient, d.
        estimate_T = estimate_T.detach() + difference_T.detach() * (difference_T - difference_T.detach())
    return estimate_T if cap is None else estimate_T.clamp(-cap, cap)
