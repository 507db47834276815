"""The section `reproduces`: which row of a published table a run is, and what came out there. Torch-free.

It changes no number of a run. What reads it is `megarl reproduce`, and the table in docs/reproduce.md.
"""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import Field, NonNegativeFloat, field_validator

from megarl.config.base import PathText, Settings

Percent = Annotated[float, Field(ge=0, le=100)]


class MadeFile(Settings):
    """A file that the run reads, and how it comes to be."""

    path: PathText = Field(description="The file, as data or evaluation name it.")
    hub: str | None = Field(default=None, description="Hub name of the data set that it is made of; none: of no other.")
    make: str = Field(
        min_length=1, description="What makes it: a program of tools/, with its arguments, in the working folder."
    )


class ReproducesSettings(Settings):
    """A row of a published table, or a recipe of our own beside such rows."""

    table: str = Field(
        description="Name of the table that it belongs to.",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
    )
    row: str = Field(min_length=1, description="What the row is called there.")
    source: str = Field(min_length=1, description="The paper and its table; ours: a row that no paper has.")
    model: str | None = Field(
        default=None, description="Hub name of the model that model.path is a copy of; none: one of the files is it."
    )
    files: tuple[MadeFile, ...] = Field(default=(), description="The files of the data, and how each is made.")
    suites: tuple[str, ...] = Field(
        default=(), description="The suites that the trained model is evaluated on: names in configs/suites/, or files."
    )
    suite_settings: tuple[str, ...] = Field(
        default=(), description="Settings of this evaluation in place of the suites' own, each KEY=VALUE."
    )
    measure: str = Field(
        default="avg",
        description="What the published scores are: avg (the mean over samples), maj, or pass@k.",
    )
    scores: dict[str, Percent] = Field(
        default={}, description="The published score on each benchmark of the suites, in percent."
    )
    average: Percent | None = Field(
        default=None, description="The published mean over the benchmarks, in percent; none: none was published."
    )
    tolerance: NonNegativeFloat = Field(
        default=2.0,
        description="Points by which a published score may lie outside the interval of the measured one and still "
        "count as reproduced. Our choice.",
    )

    @field_validator("measure")
    @classmethod
    def _is_measured(cls, value: str) -> str:
        if not re.fullmatch(r"avg|maj|pass@[1-9][0-9]*", value):
            raise ValueError("must be avg, maj or pass@k, such as pass@4")
        return value
