"""GRPO and its family as settings of one algorithm.

GRPO: arXiv 2402.03300; Dr. GRPO: 2503.20783; DAPO: 2503.14476; GSPO: 2507.18071; other advantages:
`megarl.algorithms.advantages`. Which setting is whose, and what is our choice: docs/algorithms.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megarl.algorithms.advantages import batch_normalized, group_advantages
from megarl.algorithms.base import AlgorithmContext, Credit, Group, Span, Trained
from megarl.algorithms.clipped import ClippedRatio
from megarl.algorithms.plan import Generation, Plan
from megarl.config.algorithms import GroupRelativeSettings, GrpoSettings


class Grpo(ClippedRatio):
    """Group-relative advantages and the clipped ratio objective."""

    Settings = GrpoSettings

    def __init__(self, settings: GroupRelativeSettings, context: AlgorithmContext) -> None:
        super().__init__(settings, context)
        self.settings: GroupRelativeSettings = settings

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


def _with_advantage(one: Trained, advantage: float) -> Trained:
    return replace(one, spans=tuple(span._replace(advantage=advantage) for span in one.spans))
