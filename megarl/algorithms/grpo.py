"""GRPO and its family as settings of one algorithm.

GRPO: arXiv 2402.03300; Dr. GRPO: 2503.20783; DAPO: 2503.14476; GSPO: 2507.18071; other advantages:
`megarl.algorithms.advantages`. Which setting is whose, and what is our choice: docs/algorithms.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from megarl.algorithms.advantages import batch_normalized, group_advantages
from megarl.algorithms.base import Algorithm, AlgorithmContext, Credit, Group, Span, Trained
from megarl.algorithms.objective import BatchTotals, LossInputs, LossTerms, Objective, required
from megarl.algorithms.plan import Generation, Plan
from megarl.config.algorithms import GroupRelativeSettings, GrpoSettings
from megarl.config.parameter_sets import REFERENCE
from megarl.ops.clip import clipped_objective
from megarl.ops.importance import ImportanceWeights, importance_weights, rejected_tokens
from megarl.ops.kl import kl_estimate
from megarl.ops.masking import sum_counted, zero_masked
from megarl.ops.ratios import k3_from_log_ratio, sequence_ratio, token_ratio


class Grpo(Algorithm):
    """Group-relative advantages and the clipped ratio objective."""

    Settings = GrpoSettings

    def __init__(self, settings: GroupRelativeSettings, context: AlgorithmContext) -> None:
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

    def plan(self, step: int) -> Plan:
        """Answers, and under `dynamic_sampling` more of them while groups are dropped."""
        batches = self.settings.max_generation_batches if self.settings.dynamic_sampling else 1
        return Plan((Generation(self.context.group_size),), batches)

    def drop_reason(self, group: Group) -> str | None:
        """Under `dynamic_sampling` groups whose rewards are all equal are dropped, DAPO Eq. 11."""
        if self.settings.dynamic_sampling and min(group.rewards) == max(group.rewards):
            return "groups_without_variance"
        return None

    def credit(self, step: int, groups: Sequence[Group]) -> list[Credit]:
        """Every answer's `spans` with its advantage; REINFORCE++'s are normalised over the step.

        An answer of which nothing is trained counts in its group's advantages alone.
        """
        found = [self._of_group(step, group) for group in groups]
        if self.settings.advantage not in ("reinforce_pp", "reinforce_pp_baseline"):
            return [Credit(trained) for trained in found]
        answers = [one for trained in found for one in trained]
        advantages = [one.spans[0].advantage for one in answers]
        normalized = iter(batch_normalized(self.settings, advantages, [one.tokens for one in answers]))
        return [Credit(tuple(_with_advantage(one, next(normalized)) for one in trained)) for trained in found]

    def _of_group(self, step: int, group: Group) -> tuple[Trained, ...]:
        advantages, spans = self.advantages(group), self.spans(step, group)
        asked = [
            Trained(head, (Span(*span, advantage),))
            for head, span, advantage in zip(group.answers, spans, advantages, strict=True)
        ]
        return tuple(one for one in asked if one.spans)

    def advantages(self, group: Group) -> tuple[float, ...]:
        """One per answer, of the group alone, by `advantage`: `megarl.algorithms.advantages.group_advantages`."""
        return group_advantages(self.settings, self.shape_rewards(group), group.lengths)

    def shape_rewards(self, group: Group) -> tuple[float, ...]:
        """Rewards less the soft overlong penalty, DAPO Eq. 13: it grows linearly over the last `overlong_buffer`
        tokens before rollout.max_tokens, from 0 to `overlong_penalty`."""
        buffer = self.settings.overlong_buffer
        if buffer is None:
            return group.rewards
        free = self.context.max_tokens - buffer
        excess = [min(max(length - free, 0), buffer) / buffer for length in group.lengths]
        return tuple(
            reward - self.settings.overlong_penalty * share for reward, share in zip(group.rewards, excess, strict=True)
        )

    def spans(self, step: int, group: Group) -> tuple[tuple[int, int], ...]:
        """Which tokens of each answer are trained, as (start, end): all."""
        return tuple((0, length) for length in group.lengths)

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


def _with_advantage(one: Trained, advantage: float) -> Trained:
    return replace(one, spans=tuple(span._replace(advantage=advantage) for span in one.spans))
