"""An algorithm whose step has answers by the policy and others by the weights that the run began with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megarl.algorithms.base import AlgorithmContext, Credit, Group, Trained, whole
from megarl.algorithms.grpo import Grpo
from megarl.algorithms.plan import Generation, Plan
from megarl.config.algorithms import GroupRelativeSettings
from megarl.config.parameter_sets import REFERENCE, ParameterSet
from megarl.config.sections import RunSettings

OTHER = "other"


class TwoWritersSettings(GroupRelativeSettings):
    """GRPO's, with importance weights for what others wrote."""

    importance_cap: float | None = 5.0

    def parameter_sets(self, run: RunSettings) -> tuple[ParameterSet, ...]:
        return (ParameterSet(REFERENCE, generates=True),)

    def sequences_per_prompt(self, run: RunSettings) -> int:
        return run.rollout.group_size + 1


class TwoWriters(Grpo):
    """GRPO, and a step towards an answer of the beginning to each prompt."""

    Settings = TwoWritersSettings

    def __init__(self, settings: Any, context: AlgorithmContext) -> None:
        super().__init__(settings, context)
        self.objectives = (replace(self.objectives[0], kinds=frozenset({"answer", OTHER})),)

    def plan(self, step: int) -> Plan:
        return Plan((*super().plan(step).generations, Generation(1, OTHER, REFERENCE, graded=False)))

    def credit(self, step: int, groups: Sequence[Group]) -> list[Credit]:
        others = [tuple(Trained(head, whole(head, 0.5)) for head in group.of(OTHER)) for group in groups]
        answers = super().credit(step, groups)
        return [Credit((*own.trained, *other)) for own, other in zip(answers, others, strict=True)]
