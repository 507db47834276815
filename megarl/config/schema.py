"""A whole run: the sections of its file, and the algorithm that its `algorithm:` table names. Torch-free."""

from __future__ import annotations

from typing import Any

from pydantic import SerializeAsAny, field_validator

from megarl.config.algorithms import AlgorithmSettings
from megarl.config.algorithms.choice import algorithm_settings
from megarl.config.sections import RunSettings


class RunConfig(RunSettings):
    """A whole run."""

    algorithm: SerializeAsAny[AlgorithmSettings]

    @field_validator("algorithm", mode="before")
    @classmethod
    def _algorithm_record(cls, value: Any) -> Any:
        """Turn the `algorithm:` table into the settings record that its name asks for."""
        return algorithm_settings(value)
