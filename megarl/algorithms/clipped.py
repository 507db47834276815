"""The clipped ratio objective of PPO, with the terms and corrections that language models are trained with.

PPO: arXiv 1707.06347, Eq. 7; token mean and clip-higher: DAPO, 2503.14476; sequence ratios: GSPO, 2507.18071. Which
setting is whose, and what is our choice: docs/algorithms.md.
"""

from __future__ import annotations

from torch import Tensor

from megarl.algorithms.base import Algorithm, AlgorithmContext
from megarl.algorithms.objective import BatchTotals, LossInputs, LossTerms, Objective, required
from megarl.config.algorithms import ClippedSettings
from megarl.config.parameter_sets import REFERENCE
from megarl.ops.clip import clipped_objective
from megarl.ops.importance import ImportanceWeights, importance_weights, rejected_tokens
from megarl.ops.kl import kl_estimate
from megarl.ops.masking import sum_counted, zero_masked
from megarl.ops.ratios import k3_from_log_ratio, sequence_ratio, token_ratio


class ClippedRatio(Algorithm):
    """An algorithm that trains answers by advantages of its own under the clipped ratio objective."""

    settings: ClippedSettings

    def __init__(self, settings: ClippedSettings, context: AlgorithmContext) -> None:
        self.settings = settings
        self.context = context
        answers = Objective(
            self.loss,
            kinds=frozenset({"answer"}),
            advantages=True,
            old=True,
            rollout=settings.importance_cap is not None or settings.rejection_bounds is not None,
            under=(REFERENCE,) if settings.kl_coefficient > 0 else (),
            entropy_gradient=settings.entropy_coefficient != 0,
        )
        self.objectives = (answers,)

    def loss(self, inputs: LossInputs) -> LossTerms:
        """The objective on answers.

        Per counted token that is not rejected: -weight x clipped objective + kl_coefficient x KL -
        entropy_coefficient x entropy; all three are aggregated alike, and rejected tokens stay in the divisor, which
        is known before their ratios are. Logs per-token means of `ratio_mean` (the ratio in the objective),
        `clip_share` (tokens whose gradient the clip took away), `kl_old_k3` (k3 estimate of KL(old || current), from
        the token ratios), and where their setting is on `dual_clip_share`, `importance_weight_mean`,
        `importance_bound_share` (tokens whose weight a bound changed), `rejected_share` and `reference_kl` (the
        estimate of `kl_kind`).
        """
        settings = self.settings
        counted_T = inputs.mask_T > 0
        log_probs_T = zero_masked(counted_T, inputs.log_probs_T)
        # Detached, as they may be the current log-probs themselves.
        old_T = zero_masked(counted_T, required(inputs.old_log_probs_T, "old_log_probs_T").detach())
        advantages_T = zero_masked(counted_T, required(inputs.advantages_T, "advantages_T"))
        entropy_T = zero_masked(counted_T, inputs.entropy_T)

        log_ratio_T = log_probs_T - old_T
        ratio_T = self._ratio(log_ratio_T, inputs)
        objective = clipped_objective(ratio_T, advantages_T, settings.clip_low, settings.clip_high, settings.dual_clip)
        losses_T = -objective.values_T
        clamp = settings.log_ratio_clamp
        logged_T = {
            "ratio_mean": ratio_T,
            "clip_share": objective.clipped_T,
            "kl_old_k3": k3_from_log_ratio(log_ratio_T.clamp(-clamp, clamp)),
        }
        if settings.dual_clip is not None:
            logged_T["dual_clip_share"] = objective.dual_clipped_T
        weights, rejected_T = self._mismatch(counted_T, old_T, inputs)
        if weights is not None:
            losses_T = losses_T * weights.values_T
            logged_T |= {"importance_weight_mean": weights.values_T, "importance_bound_share": weights.bounded_T}
        if settings.kl_coefficient > 0:
            reference_T = zero_masked(counted_T, inputs.under(REFERENCE))
            kl_T = kl_estimate(log_probs_T, reference_T, settings.kl_kind, clamp, settings.kl_cap)
            losses_T = losses_T + settings.kl_coefficient * kl_T
            logged_T["reference_kl"] = kl_T
        if settings.entropy_coefficient != 0:
            losses_T = losses_T - settings.entropy_coefficient * entropy_T
        if rejected_T is not None:
            losses_T = zero_masked(~rejected_T, losses_T)
            logged_T["rejected_share"] = rejected_T
        return LossTerms(
            loss=(self._weights(counted_T, inputs) * losses_T).sum(),
            means={name: (sum_counted(counted_T, v_T), inputs.totals.tokens) for name, v_T in logged_T.items()},
        )

    def _ratio(self, log_ratio_T: Tensor, inputs: LossInputs) -> Tensor:
        clamp = self.settings.log_ratio_clamp
        if self.settings.ratio_level == "token":
            return token_ratio(log_ratio_T, clamp)
        return sequence_ratio(log_ratio_T, inputs.sequence_T, inputs.lengths_S, clamp)

    def _mismatch(
        self, counted_T: Tensor, old_T: Tensor, inputs: LossInputs
    ) -> tuple[ImportanceWeights | None, Tensor | None]:
        """The importance weights and which tokens are rejected ([T] bool), None where the settings ask for none."""
        settings = self.settings
        if settings.importance_cap is None and settings.rejection_bounds is None:
            return None, None
        rollout_T = zero_masked(counted_T, required(inputs.rollout_log_probs_T, "rollout_log_probs_T"))
        log_ratio_T, weights, rejected_T = old_T - rollout_T, None, None
        if settings.importance_cap is not None:
            weights = importance_weights(
                log_ratio_T,
                inputs.sequence_T,
                inputs.num_sequences,
                settings.importance_level,
                settings.importance_mode,
                settings.importance_floor,
                settings.importance_cap,
            )
        if settings.rejection_bounds is not None:
            rejected_T = rejected_tokens(
                log_ratio_T, inputs.sequence_T, inputs.lengths_S, settings.rejection_level, *settings.rejection_bounds
            )
        return weights, rejected_T

    def _weights(self, counted_T: Tensor, inputs: LossInputs) -> Tensor:
        constant, tokens = self.settings.aggregation_constant, self._divisor(inputs.totals)
        constant = float(self.context.max_tokens) if constant is None else constant
        return inputs.weights(self.settings.aggregation, counted_T, constant=constant, tokens=tokens)

    def _divisor(self, totals: BatchTotals) -> float:
        """The tokens that a mean over tokens divides by."""
        return totals.tokens
