"""START (arXiv 2603.20799): first the thinking is trained, on the reward of the answer that follows it.

Published in full is the idea alone. The two stages as spans of GRPO's loss, and every setting, are our reading of it:
docs/algorithms.md.
"""

from __future__ import annotations

from dataclasses import replace

from megarl.algorithms.base import AlgorithmContext, GroupOutcome, Responder
from megarl.algorithms.grpo import Grpo
from megarl.algorithms.objective import LossInputs, LossTerms
from megarl.config.algorithms import StartSettings


class Start(Grpo):
    """GRPO on a part of each output: in stage 1 on the thinking, in stage 2 on the response or on everything."""

    Settings = StartSettings

    def __init__(self, settings: StartSettings, context: AlgorithmContext) -> None:
        super().__init__(settings, context)
        self.settings: StartSettings = settings
        self.begin_step(1)

    def begin_step(self, step: int) -> None:
        """Stage 1 for the first `thinking_steps` steps (all, where that is None), then stage 2, whose responses the
        policy itself writes."""
        settings = self.settings
        self._thinks = settings.thinking_steps is None or step <= settings.thinking_steps
        responder = None
        if self._thinks and (settings.responder != "policy" or settings.responses > 1):
            weights = "current" if settings.responder == "policy" else "initial"
            responder = Responder(weights, settings.responses)
        self.needs = replace(self.needs, thinking=True, responder=responder)

    def spans(self, outcome: GroupOutcome) -> tuple[tuple[int, int], ...]:
        """Stage 1: the thinking, its end mark included. Stage 2: the response, or all of the output.

        An output that is not one thinking and a response has an empty span, but for all of the output under
        `second_stage` full.

        Raises:
            ValueError: the loop did not provide `thinking_lengths`.
        """
        if not self._thinks and self.settings.second_stage == "full":
            return super().spans(outcome)
        if outcome.thinking_lengths is None:
            raise ValueError("GroupOutcome.thinking_lengths is None, but the algorithm needs it")
        return tuple(
            (0, 0) if thinking is None else (0, thinking) if self._thinks else (thinking, length)
            for thinking, length in zip(outcome.thinking_lengths, outcome.lengths, strict=True)
        )

    def loss(self, inputs: LossInputs) -> LossTerms:
        """GRPO's, whose token mean divides by all tokens of the outputs under `normalizer` response."""
        if self.settings.normalizer == "response":
            totals = replace(inputs.totals, tokens=inputs.totals.response_tokens)
            inputs = replace(inputs, totals=totals)
        return super().loss(inputs)
