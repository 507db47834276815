"""NFT, negative-aware fine-tuning (arXiv 2505.18116): supervised learning on right and, implicitly, on wrong answers.

Which setting is the paper's, which its published code's and which ours: docs/algorithms.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from megarl.algorithms.base import Algorithm, AlgorithmContext, Credit, Group, Trained, whole
from megarl.algorithms.objective import LossInputs, LossTerms, Objective, required
from megarl.algorithms.plan import Generation, Plan
from megarl.config.algorithms import NftSettings
from megarl.ops.implicit_negative import implicit_negative
from megarl.ops.masking import sum_counted, zero_masked
from megarl.ops.ratios import k3_from_log_ratio
from megarl.ops.segments import sum_by_sequence

#: Least distance of a success rate from 0 and 1, whatever `rate_clamp`: the odds stay finite in float32.
RATE_MARGIN = 1e-6


class Nft(Algorithm):
    """The policy's log-ratio on right answers, the implicit negative policy's on wrong ones, weighted by prompt."""

    Settings = NftSettings

    def __init__(self, settings: NftSettings, context: AlgorithmContext) -> None:
        self.settings = settings
        self.context = context
        self.objectives = (Objective(self.loss, kinds=frozenset({"answer"}), old=True),)

    def plan(self, step: int) -> Plan:
        """Answers, and under `dynamic_sampling` more of them while groups are dropped."""
        batches = self.settings.max_generation_batches if self.settings.dynamic_sampling else 1
        return Plan((Generation(self.context.group_size),), batches)

    def drop_reason(self, group: Group) -> str | None:
        """Groups whose rewards `rewards` does not allow are dropped always; under `dynamic_sampling` also those whose
        rewards are all equal, which the paper filters out.

        Reasons: groups_reward_not_binary, groups_all_right, groups_all_wrong (binary); groups_reward_out_of_range,
        groups_without_variance (continuous).
        """
        rewards = group.rewards
        low, high = min(rewards), max(rewards)
        binary = self.settings.rewards == "binary"
        if binary and any(reward not in (0.0, 1.0) for reward in rewards):
            return "groups_reward_not_binary"
        if low < 0.0 or high > 1.0:
            return "groups_reward_out_of_range"
        if low < high or not self.settings.dynamic_sampling:
            return None
        if not binary:
            return "groups_without_variance"
        return "groups_all_right" if low == 1.0 else "groups_all_wrong"

    def credit(self, step: int, groups: Sequence[Group]) -> list[Credit]:
        """Every answer whole, with its reward for the advantage, and with `signals`."""
        return [self._of_group(group) for group in groups]

    def _of_group(self, group: Group) -> Credit:
        signals = self.signals(group)
        answers = (
            Trained(head, whole(head, reward), {name: values[k] for name, values in signals.items()})
            for k, (head, reward) in enumerate(zip(group.answers, group.rewards, strict=True))
        )
        return Credit(tuple(one for one in answers if one.spans))

    def signals(self, group: Group) -> dict[str, tuple[float, ...]]:
        """`reward`; the prompt's `success_rate`, clamped; its `prompt_weight`, exactly 0 where all rewards are equal.

        The weight is computed from the clamped rate, as in the published code.
        """
        rewards = group.rewards
        margin = max(self.settings.rate_clamp, RATE_MARGIN)
        rate = min(max(math.fsum(rewards) / len(rewards), margin), 1.0 - margin)
        weight = 0.0 if min(rewards) == max(rewards) else self._prompt_weight(rate)
        return {
            "reward": rewards,
            "success_rate": (rate,) * len(rewards),
            "prompt_weight": (weight,) * len(rewards),
        }

    def loss(self, inputs: LossInputs) -> LossTerms:
        """The objective on answers: NFT Eq. 10 with the settings' weights.

        Logs per-token means of `ratio_mean` (the ratio in the loss), `kl_old_k3` (k3 estimate of KL(old || current),
        from the token ratios), and, where prompts without a weight count 0: `wrong_share` (1 - reward),
        `implicit_negative_mean` (1 - reward times the bounded ratio of the implicit negative policy; divided by
        wrong_share it is the mean over wrong answers) and `straight_through_share` (tokens of wrong answers where the
        bound epsilon acts).
        """
        settings = self.settings
        counted_T = inputs.mask_T > 0
        # Detached, as they may be the current log-probs themselves.
        old_T = zero_masked(counted_T, required(inputs.old_log_probs_T, "old_log_probs_T").detach())
        token_log_ratio_T = zero_masked(counted_T, inputs.log_probs_T) - old_T
        log_ratio_T = self._log_ratio(token_log_ratio_T, inputs)
        right_T = inputs.signals_S["reward"][inputs.sequence_T]
        rate_T = inputs.signals_S["success_rate"][inputs.sequence_T]
        prompt_weight_T = inputs.signals_S["prompt_weight"][inputs.sequence_T]
        weighted_T = counted_T & (prompt_weight_T > 0)

        negative = implicit_negative(log_ratio_T, rate_T, settings.epsilon)
        wrong_T = 1.0 - right_T
        log_likelihood_T = right_T * log_ratio_T + settings.negative_weight * wrong_T * negative.log_ratios_T
        losses_T = -prompt_weight_T * log_likelihood_T
        logged_T = {
            "ratio_mean": log_ratio_T.exp(),
            "kl_old_k3": k3_from_log_ratio(token_log_ratio_T.clamp(max=settings.log_ratio_clamp)),
        }
        negative_T = {
            "wrong_share": wrong_T,
            "implicit_negative_mean": wrong_T * negative.ratios_T,
            "straight_through_share": negative.floored_T & (wrong_T > 0),
        }
        sums = {name: sum_counted(counted_T, values_T) for name, values_T in logged_T.items()}
        sums |= {name: sum_counted(weighted_T, values_T) for name, values_T in negative_T.items()}
        return LossTerms(
            loss=(
                inputs.weights(settings.aggregation, counted_T, constant=settings.aggregation_constant) * losses_T
            ).sum(),
            means={name: (value, inputs.totals.tokens) for name, value in sums.items()},
        )

    def _prompt_weight(self, rate: float) -> float:
        """omega(q) of NFT Eq. 10: one_minus_rate gives Dr. GRPO's gradient on-policy, sqrt_odds GRPO's (Prop. 4.2)."""
        kind = self.settings.prompt_weight
        if kind == "one":
            return 1.0
        return 1.0 - rate if kind == "one_minus_rate" else math.sqrt((1.0 - rate) / rate)

    def _log_ratio(self, token_log_ratio_T: Tensor, inputs: LossInputs) -> Tensor:
        """log R of each token, or the mean over its sequence; no gradient beyond `log_ratio_clamp`."""
        if self.settings.ratio_level == "sequence":
            sums_S = sum_by_sequence(token_log_ratio_T, inputs.sequence_T, inputs.num_sequences)
            # An empty sequence must not divide by 0: its gradient would be 0 x inf.
            token_log_ratio_T = (sums_S / inputs.lengths_S.clamp(min=1.0))[inputs.sequence_T]
        return token_log_ratio_T.clamp(max=self.settings.log_ratio_clamp)
