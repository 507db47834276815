"""START (arXiv 2603.20799): first the thinking is trained, on the reward of the answer that follows it.

Published in full is the idea alone. The two stages as spans of GRPO's loss, and every setting, are our reading of it:
docs/algorithms.md.
"""

from __future__ import annotations

from dataclasses import replace

from megarl.algorithms.base import AlgorithmContext, Group
from megarl.algorithms.grpo import Grpo
from megarl.algorithms.objective import BatchTotals
from megarl.algorithms.plan import Plan, Responder
from megarl.config.algorithms import StartSettings
from megarl.config.parameter_sets import POLICY, REFERENCE


class Start(Grpo):
    """GRPO on a part of each output: in stage 1 on the thinking, in stage 2 on the response or on everything."""

    Settings = StartSettings

    splits_thinking = True

    def __init__(self, settings: StartSettings, context: AlgorithmContext) -> None:
        super().__init__(settings, context)
        self.settings: StartSettings = settings

    def thinks(self, step: int) -> bool:
        """Whether a step is one of stage 1: the first `thinking_steps`, all where that is None."""
        return self.settings.thinking_steps is None or step <= self.settings.thinking_steps

    def plan(self, step: int) -> Plan:
        """GRPO's; in stage 1 with responses apart from the thinking, where other weights write them or several are
        written. In stage 2 the policy itself writes everything."""
        plan, settings = super().plan(step), self.settings
        if not self.thinks(step) or (settings.responder == "policy" and settings.responses == 1):
            return plan
        responder = Responder(POLICY if settings.responder == "policy" else REFERENCE, settings.responses)
        return replace(plan, generations=tuple(replace(one, responder=responder) for one in plan.generations))

    def spans(self, step: int, group: Group) -> tuple[tuple[int, int], ...]:
        """Stage 1: the thinking, its end mark included. Stage 2: the response, or all of the output.

        An output that is not one thinking and a response has an empty span, but for all of the output under
        `second_stage` full.
        """
        thinks = self.thinks(step)
        if not thinks and self.settings.second_stage == "full":
            return super().spans(step, group)
        ends = [head.marks.get("thinking") for head in group.answers]
        return tuple(
            (0, 0) if end is None else (0, end) if thinks else (end, length)
            for end, length in zip(ends, group.lengths, strict=True)
        )

    def _divisor(self, totals: BatchTotals) -> float:
        """All tokens of the outputs, trained or not, under `normalizer` response."""
        return totals.response_tokens if self.settings.normalizer == "response" else totals.tokens
