"""Settings of supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from megarl.config.algorithms.base import AlgorithmSettings
from megarl.config.sections import RunSettings
from megarl.errors import Refusal


class SftSettings(AlgorithmSettings):
    """Supervised fine-tuning on the data set's worked solutions: mean negative log-likelihood per token."""

    generates: ClassVar[bool] = False

    name: Literal["sft"] = "sft"

    def refusals(self, run: RunSettings) -> Iterator[Refusal]:
        if run.data.solution_column is None:
            yield Refusal(
                "data.solution_column=null",
                "must name the column of the worked solutions that supervised training learns",
                "set data.solution_column",
            )
