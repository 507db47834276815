"""Settings of AttnRL, and of TreeRL as its baseline."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from megarl.config.algorithms.grpo import ClippedSettings
from megarl.config.base import without_effect
from megarl.config.influence import InfluenceSettings
from megarl.config.sections import RunSettings
from megarl.errors import Refusal

#: What decides how trees grow: in a run that goes on all of them grow alike.
_OF_TREES = ("branching", "points", "continuations", "expansion", "drop_easy", "quantile", "gap")


class AttnrlSettings(ClippedSettings):
    """AttnRL (arXiv 2509.26628): first samples are gone on with from steps that later ones look at, and every segment
    is worth what its leaves are.

    The defaults are the authors' released code where that and the paper differ. TreeRL (arXiv 2506.11902), its
    baseline, is branching=entropy, expansion=all, drop_easy=false, adapt=0; GRPO in the same pipeline is
    branching=none.
    """

    takes_turns: ClassVar[bool] = False
    learns_late: ClassVar[bool] = True
    grows: ClassVar[bool] = True

    name: Literal["attnrl"] = "attnrl"
    branching: Literal["attention", "entropy", "none"] = Field(
        default="attention",
        description="Where samples are gone on with: before steps that later steps look at (AttnRL), before the tokens "
        "of the highest entropy (TreeRL), or nowhere.",
    )
    points: PositiveInt = Field(default=2, description="Branch points of a tree (N).")
    continuations: PositiveInt = Field(default=2, description="Continuations from each branch point (T).")
    expansion: Literal["difficulty", "all"] = Field(
        default="difficulty",
        description="How many of a problem's G first samples become trees: ceil(G exp(-z)), z being the share that is "
        "right (AttnRL's code; the paper rounds), or all.",
    )
    drop_easy: bool = Field(
        default=True,
        description="A problem whose first samples are all right is left out unless its mean influence is above that "
        "of all such problems so far (AttnRL's code; the paper filters whatever the samples are).",
    )
    quantile: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.8, description="Branch points have an influence at or above this quantile of the sample's steps."
    )
    gap: NonNegativeInt = Field(
        default=512,
        description="Tokens between a branch point chosen by influence and the sequence's begin, and any other one.",
    )
    attention: InfluenceSettings = Field(
        default=InfluenceSettings(), description="How influence is measured, with branching=attention or drop_easy."
    )
    adapt: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.1,
        description="Share by which the prompts of the next steps move to as many as would have given batch.prompts "
        "fully grown problems' sequences with a signal; 0: always batch.prompts.",
    )
    prompts_least: PositiveInt | None = Field(
        default=None, description="Least prompts of a step under adapt; default half of batch.prompts. Our choice."
    )
    prompts_most: PositiveInt | None = Field(
        default=None, description="Most prompts of a step under adapt; default twice batch.prompts. Our choice."
    )
    clip_high: Annotated[float, Field(ge=0)] = Field(default=0.28, description="Upper clip range of the ratio.")
    dual_clip: Annotated[float, Field(gt=1)] | None = Field(
        default=3.0, description="Lower bound c x advantage on the objective of tokens with negative advantage."
    )
    kl_coefficient: Annotated[float, Field(ge=0)] = Field(
        default=0.001, description="Weight of KL(policy || reference) in the loss."
    )

    @property
    def influence(self) -> InfluenceSettings | None:
        return self.attention if self.branching == "attention" or self.drop_easy else None

    @property
    def kept_on_resume(self) -> tuple[str, ...]:
        own = tuple(f"algorithm.{name}" for name in _OF_TREES)
        of_attention = tuple(f"algorithm.attention.{name}" for name in ("distance", "layers", "heads"))
        # Half-grown trees have as many first samples, and branch points within this length.
        return (*own, *of_attention, "rollout.ahead", "rollout.group_size", "rollout.max_tokens")

    @property
    def leaves_per_sample(self) -> int:
        """Leaves of a whole tree."""
        return 1 if self.branching == "none" else 1 + self.points * self.continuations

    def sequences_per_prompt(self, run: RunSettings) -> int:
        return run.rollout.group_size * self.leaves_per_sample

    def prompt_bounds(self, prompts: int) -> tuple[int, int]:
        """The least and the most prompts that a step asks, where it begins with `prompts`."""
        if self.adapt == 0:
            return prompts, prompts
        return self.prompts_least or -(-prompts // 2), self.prompts_most or 2 * prompts

    def most_prompts(self, run: RunSettings) -> int:
        return self.prompt_bounds(run.batch.prompts)[1]

    def refusals(self, run: RunSettings) -> Iterator[Refusal]:
        yield from super().refusals(run)
        yield from self._unused()
        if run.rollout.group_size == 1:
            yield Refusal(
                "rollout.group_size=1",
                "gives no sample another to be compared with",
                "set rollout.group_size to 2 or more",
            )
        wanted = run.batch.prompts
        least, most = self.prompt_bounds(wanted)
        if not least <= wanted <= most:
            yield Refusal(
                f"batch.prompts={wanted}",
                f"must be among the {least} to {most} prompts that a step may ask",
                "change algorithm.prompts_least or algorithm.prompts_most",
            )

    def _unused(self) -> Iterator[Refusal]:
        """Settings of what another one leaves out."""
        if self.branching == "none":
            names = ("points", "continuations", "expansion")
            yield from without_effect(self, "algorithm", names, "with algorithm.branching=none")
        if self.branching != "attention":
            cause = f"with algorithm.branching={self.branching}"
            yield from without_effect(self, "algorithm", ("quantile", "gap"), cause)
        if self.influence is None and self.attention != InfluenceSettings():
            rule = f"has no effect with algorithm.branching={self.branching} and algorithm.drop_easy=false"
            yield Refusal("algorithm.attention", rule, "remove it")
        if self.adapt == 0:
            names = ("prompts_least", "prompts_most")
            cause, fix = "with algorithm.adapt=0", "set algorithm.adapt or remove it"
            yield from without_effect(self, "algorithm", names, cause, fix)
