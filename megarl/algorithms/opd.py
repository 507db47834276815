"""On-policy distillation: the policy writes the answers, a teacher says of each token how likely it finds it.

The objective is GKD's on the policy's own answers alone (arXiv 2306.13649, lambda = 1) with reverse KL, of which each
sampled token gives an estimate, followed by policy gradient. Which setting is whose: docs/algorithms.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from megarl.algorithms.base import Algorithm, AlgorithmContext, Credit, Group, Trained, whole
from megarl.algorithms.objective import LossInputs, LossTerms, Objective, required
from megarl.algorithms.plan import Generation, Plan
from megarl.config.algorithms import OpdSettings
from megarl.config.parameter_sets import TEACHER
from megarl.ops.clip import clipped_objective
from megarl.ops.masking import sum_counted, zero_masked
from megarl.ops.ratios import k3_from_log_ratio, token_ratio
from megarl.ops.segments import discounted_sums


class Opd(Algorithm):
    """Every answer is trained, each of its tokens by the teacher's opinion of it; rewards are logged alone."""

    Settings = OpdSettings

    def __init__(self, settings: OpdSettings, context: AlgorithmContext) -> None:
        self.settings = settings
        self.context = context
        self.objectives = (Objective(self.loss, kinds=frozenset({"answer"}), old=True, under=(TEACHER,)),)

    def plan(self, step: int) -> Plan:
        """Answers, which need no reward."""
        return Plan((Generation(self.context.group_size, needs_reward=False),))

    def credit(self, step: int, groups: Sequence[Group]) -> list[Credit]:
        """All answers, whole. Their advantages follow in the loss, where the teacher's log-probs are."""
        return [Credit(tuple(Trained(head, whole(head)) for head in group.answers)) for group in groups]

    def loss(self, inputs: LossInputs) -> LossTerms:
        """Per counted token -weight x ratio x advantage, the ratio being current / old, clipped where settings say so.

        The advantage, a constant, is log teacher - log old of the token and, by `discount`, of those after it in its
        answer: with the answers drawn from old, the expectation of -log teacher + log old is KL(old || teacher).

        Logs per-token means of `teacher_kl` (log old - log teacher, so their mean estimates the reverse KL per token),
        `ratio_mean`, `kl_old_k3` (k3 estimate of KL(old || current)), and, where their setting is on, `clip_share`
        (tokens whose gradient the clip took away) and `advantage_cap_share` (tokens whose difference was capped).
        """
        settings = self.settings
        counted_T = inputs.mask_T > 0
        # Detached, as they may be the current log-probs themselves.
        old_T = zero_masked(counted_T, required(inputs.old_log_probs_T, "old_log_probs_T").detach())
        difference_T = zero_masked(counted_T, inputs.under(TEACHER).detach()) - old_T
        log_ratio_T = zero_masked(counted_T, inputs.log_probs_T) - old_T
        clamp = settings.log_ratio_clamp
        ratio_T = token_ratio(log_ratio_T, clamp)
        logged_T = {
            "teacher_kl": -difference_T,
            "ratio_mean": ratio_T,
            "kl_old_k3": k3_from_log_ratio(log_ratio_T.clamp(-clamp, clamp)),
        }
        cap = settings.advantage_cap
        if cap is not None:
            logged_T["advantage_cap_share"] = difference_T.abs() > cap
            difference_T = difference_T.clamp(-cap, cap)
        advantages_T = discounted_sums(difference_T, inputs.sequence_T, settings.discount)
        low = 1.0 if settings.clip_low is None else settings.clip_low
        high = math.inf if settings.clip_high is None else settings.clip_high
        objective = clipped_objective(ratio_T, advantages_T, low, high, None)
        if settings.clip_low is not None or settings.clip_high is not None:
            logged_T["clip_share"] = objective.clipped_T
        return LossTerms(
            loss=-(inputs.weights(settings.aggregation, counted_T) * objective.values_T).sum(),
            means={name: (sum_counted(counted_T, v_T), inputs.totals.tokens) for name, v_T in logged_T.items()},
        )
