"""Settings of supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

from megarl.config.algorithms.base import AlgorithmSettings
from megarl.errors import Refusal

if TYPE_CHECKING:
    from megarl.config.schema import RunConfig


class SftSettings(AlgorithmSettings):
    """Supervised fine-tuning on the data set's worked solutions: mean negative log-likelihood per token."""

    generates: ClassVar[bool] = False

    name: Literal["sft"] = "sft"

    def refusals(self, run: RunConfig) -> Iterator[Refusal]:
        if run.data.solution_column is None:
            yield Refusal(
                "data.solution_column=null",
                "must name the column of the worked solutions that supervised training learns",
                "set data.solution_column",
            )
