"""Supervised training whose loss is not a number at chosen updates, on the first rank alone."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import ClassVar

from megarl.algorithms.base import AlgorithmContext
from megarl.algorithms.objective import LossInputs, LossTerms
from megarl.algorithms.sft import Sft
from megarl.config.algorithms import AlgorithmSettings, SftSettings


class PoisonedSettings(AlgorithmSettings):
    """`updates`: which of this process's updates are poisoned, counted from 1."""

    generates: ClassVar[bool] = False

    name: str = "poisoned:Poisoned"
    updates: tuple[int, ...]


class Poisoned(Sft):
    """Needs mini-batches of one micro-batch, so that each call is an update."""

    Settings = PoisonedSettings

    def __init__(self, settings: PoisonedSettings, context: AlgorithmContext) -> None:
        super().__init__(SftSettings(), context)
        self._poisoned = settings.updates
        self._calls = 0

    def loss(self, inputs: LossInputs) -> LossTerms:
        self._calls += 1
        terms = super().loss(inputs)
        if os.environ["RANK"] == "0" and self._calls in self._poisoned:
            return replace(terms, loss=terms.loss * float("nan"))
        return terms
