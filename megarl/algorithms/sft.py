"""Supervised fine-tuning: mean negative log-likelihood per response token."""

from __future__ import annotations

from megarl.algorithms.base import Algorithm, AlgorithmContext, Needs
from megarl.algorithms.objective import LossInputs, LossTerms
from megarl.config.algorithms import SftSettings
from megarl.ops.aggregate import token_weights
from megarl.ops.masking import sum_counted, zero_masked


class Sft(Algorithm):
    """loss = -(1 / N) sum over the mini-batch's N counted tokens of log p(token)."""

    Settings = SftSettings

    def __init__(self, settings: SftSettings, context: AlgorithmContext) -> None:
        self.settings = settings
        self.needs = Needs()

    def loss(self, inputs: LossInputs) -> LossTerms:
        """See `Algorithm.loss`. Logs `entropy`, mean per token in nats."""
        counted_T = inputs.mask_T > 0
        weights_T = token_weights(
            "token_mean",
            counted_T,
            inputs.sequence_T,
            inputs.lengths_S,
            total_tokens=inputs.totals.tokens,
            total_sequences=inputs.totals.sequences,
            constant=1.0,
        )
        loss = -(weights_T * zero_masked(counted_T, inputs.log_probs_T)).sum()
        return LossTerms(loss, {"entropy": sum_counted(counted_T, inputs.entropy_T)})
