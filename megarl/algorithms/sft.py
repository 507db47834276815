"""Supervised fine-tuning: mean negative log-likelihood per response token."""

from __future__ import annotations

from collections.abc import Sequence

from megarl.algorithms.base import Algorithm, AlgorithmContext, Credit, Group, Trained, whole
from megarl.algorithms.objective import LossInputs, LossTerms, Objective, likelihood_loss
from megarl.algorithms.plan import Plan
from megarl.config.algorithms import SftSettings
from megarl.records import SOLUTION


class Sft(Algorithm):
    """loss = -(1 / N) sum over the mini-batch's N counted tokens of log p(token)."""

    Settings = SftSettings

    def __init__(self, settings: SftSettings, context: AlgorithmContext) -> None:
        self.settings = settings
        self.objectives = (Objective(self.loss),)

    def plan(self, step: int) -> Plan:
        """The data set's solutions."""
        return Plan(solutions=True)

    def credit(self, step: int, groups: Sequence[Group]) -> list[Credit]:
        """Every solution whole."""
        return [Credit(tuple(Trained(head, whole(head)) for head in group.of(SOLUTION))) for group in groups]

    def loss(self, inputs: LossInputs) -> LossTerms:
        """The objective on all texts. Logs nothing: the loss says it."""
        return likelihood_loss(inputs)
