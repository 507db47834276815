"""Settings of on-policy distillation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat

from megarl.config.algorithms.base import AlgorithmSettings
from megarl.config.base import PathText, Settings
from megarl.config.parameter_sets import TEACHER, ParameterSet, ServedSet
from megarl.config.sections import RunSettings
from megarl.config.servers import LogProbServerSettings
from megarl.errors import Refusal


class TeacherSettings(Settings):
    """The policy that is learned from, one of the two."""

    checkpoint: PathText | None = Field(
        default=None,
        description="A megarl checkpoint of a model of the policy's architecture (its directory, or a run's "
        "checkpoints/ folder).",
    )
    server: LogProbServerSettings | None = Field(
        default=None, description="A server, such as vLLM's, of any model with the policy's tokenizer."
    )


class OpdSettings(AlgorithmSettings):
    """On-policy distillation: reverse KL to a teacher on the policy's own answers (arXiv 2306.13649)."""

    name: Literal["opd"] = "opd"
    teacher: TeacherSettings = Field(default=TeacherSettings(), description="Who is learned from.")
    discount: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.0,
        description="What a token is credited for, beside its own log p_teacher - log p_policy: the following tokens', "
        "this much less with each. 0: nothing, as in GKD and in practice; 1: all, the gradient of the whole answer's "
        "reverse KL.",
    )
    advantage_cap: PositiveFloat | None = Field(
        default=None,
        description="Bound on the magnitude of a token's log p_teacher - log p_policy; none by default. Our choice.",
    )
    clip_low: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        default=None, description="Lower clip range of the ratio to the policy before the step; none: no clip."
    )
    clip_high: Annotated[float, Field(ge=0)] | None = Field(
        default=None, description="Upper clip range; none: no clip."
    )
    log_ratio_clamp: PositiveFloat = Field(
        default=20.0,
        description="Log-ratios are clamped to plus/minus this before exp (zero gradient beyond). Our choice.",
    )
    aggregation: Literal["token_mean", "sequence_mean", "token_sum"] = Field(
        default="token_mean",
        description="token_mean: sum over all tokens of the mini-batch / their count; sequence_mean: mean per answer, "
        "then over answers; token_sum: the sum, which grows with the batch.",
    )

    def parameter_sets(self, run: RunSettings) -> tuple[ParameterSet, ...]:
        checkpoint = self.teacher.checkpoint
        if checkpoint is None:
            return ()
        return (ParameterSet(TEACHER, checkpoint, "algorithm.teacher.checkpoint", measures=True),)

    def served_sets(self, run: RunSettings) -> tuple[ServedSet, ...]:
        server = self.teacher.server
        return () if server is None else (ServedSet(TEACHER, server, "algorithm.teacher.server"),)

    def refusals(self, run: RunSettings) -> Iterator[Refusal]:
        teacher = self.teacher
        fix = "set algorithm.teacher.checkpoint, or algorithm.teacher.server.url and algorithm.teacher.server.model"
        if teacher.checkpoint is None and teacher.server is None:
            yield Refusal("algorithm.teacher", "names nobody to learn from", fix)
        elif teacher.checkpoint is not None and teacher.server is not None:
            rule = "contradicts algorithm.teacher.server: there is one teacher"
            yield Refusal(f"algorithm.teacher.checkpoint={teacher.checkpoint}", rule, "remove one of the two")
