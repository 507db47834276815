"""Settings of supervised fine-tuning."""

from __future__ import annotations

from typing import ClassVar, Literal

from megarl.config.algorithms.base import AlgorithmSettings


class SftSettings(AlgorithmSettings):
    """Supervised fine-tuning on the data set's worked solutions: mean negative log-likelihood per token."""

    generates: ClassVar[bool] = False

    name: Literal["sft"] = "sft"
