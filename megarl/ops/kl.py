"""Per-token estimators of KL(policy || reference) from samples of the policy.

Names after Schulman's note "Approximating KL divergence": with d = log policy - log reference,
k1 = d, k2 = d^2 / 2, k3 = exp(-d) - 1 + d (the one in GRPO, 2402.03300 Eq. 4).
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from megarl.ops.ratios import k3_from_log_ratio

KlKind = Literal["k1", "k2", "k3"]


def kl_estimate(
    log_probs_T: Tensor, reference_log_probs_T: Tensor, kind: KlKind, log_ratio_clamp: float, cap: float | None
) -> Tensor:
    """The estimate at each token, differentiable in `log_probs_T`; shapes [T], nats.

    In a loss the gradients' expectations over the policy's own samples differ from those of the values: k1 gives 0,
    k2 the gradient of KL(policy || reference), k3 that of KL(reference || policy).

    Args:
        log_probs_T: the policy's.
        reference_log_probs_T: the reference's; a constant.
        kind: the estimator.
        log_ratio_clamp: bound on d before k3's exp; the gradient is zero beyond it. k1 and k2 have no exp.
        cap: bound on the estimate's magnitude (k1 can be negative), zero gradient beyond; None for none.
    """
    difference_T = log_probs_T - reference_log_probs_T.detach()
    if kind == "k1":
        estimate_T = difference_T
    elif kind == "k2":
        estimate_T = 0.5 * difference_T.square()
    else:
        estimate_T = k3_from_log_ratio(-difference_T.clamp(-log_ratio_clamp, log_ratio_clamp))
    return estimate_T if cap is None else estimate_T.clamp(-cap, cap)
