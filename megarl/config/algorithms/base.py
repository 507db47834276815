"""What every algorithm's settings have, and the tables that several share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from pydantic import Field, NonNegativeInt, PositiveInt

from megarl.config.base import Settings, without_effect
from megarl.config.influence import InfluenceSettings
from megarl.config.parameter_sets import ParameterSet, ServedSet
from megarl.config.sections import OptimizerSettings, RunSettings
from megarl.errors import Refusal


class AlgorithmSettings(Settings):
    """What every algorithm's settings have: its name in the table of `megarl.algorithms`."""

    #: Whether the engine writes what the algorithm trains on, all of it or a part.
    generates: ClassVar[bool] = True
    #: Sequences that the loss must see together, in one micro-batch.
    sequences_together: ClassVar[int] = 1
    #: Whether the loss takes samples for draws from the policy itself, so that none may be left out in sampling.
    draws_from_policy: ClassVar[bool] = True
    #: Whether its answers may have several turns; else they are one thinking and one response.
    takes_turns: ClassVar[bool] = True
    #: Whether it learns demonstrations, of a data set of their own, beside what is generated.
    learns_demonstrations: ClassVar[bool] = False

    #: Whether it may learn from what the weights of the step before wrote (`rollout.ahead`).
    learns_late: ClassVar[bool] = False
    #: Whether it goes on with samples from their midst (`Plan.grows`).
    grows: ClassVar[bool] = False

    name: str = Field(description="Name in the algorithm table, or an import path `package.module:Class`.")

    @property
    def answers_in_parts(self) -> bool:
        """Whether generation stops at the end of the thinking, for responses to be written to it apart."""
        return False

    @property
    def learns_solutions(self) -> bool:
        """Whether it learns the data set's worked solutions, without which a row is left out; by default where nothing
        is generated."""
        return not self.generates

    @property
    def kept_on_resume(self) -> tuple[str, ...]:
        """Keys of the run's settings that make it what it is: a run that goes on must have them as they were; none by
        default."""
        return ()

    @property
    def influence(self) -> InfluenceSettings | None:
        """How the algorithm measures what a sequence's later steps look at, in the pass for log-probs; None, the
        default: it does not."""
        return None

    def longest_prompt(self, run: RunSettings) -> int:
        """Tokens of the longest prompt that the engine is given."""
        return run.data.max_prompt_tokens

    def most_prompts(self, run: RunSettings) -> int:
        """The most prompts that a step asks, where it does not ask always batch.prompts."""
        return run.batch.prompts

    def sequences_per_prompt(self, run: RunSettings) -> int:
        """The most sequences of a prompt that are trained."""
        return run.rollout.group_size * self.generates + self.learns_solutions

    def adapter_optimizer(self, run: RunSettings) -> OptimizerSettings | None:
        """How an adapter trains beside the policy's own weights, with which the policy then computes; None, the
        default: it has none."""
        return None

    def parameter_sets(self, run: RunSettings) -> tuple[ParameterSet, ...]:
        """The weights that the algorithm keeps or trains beside the policy's own, none by default."""
        return ()

    def served_sets(self, run: RunSettings) -> tuple[ServedSet, ...]:
        """The weights that others serve and the algorithm has log-probs measured under, none by default."""
        return ()

    def refusals(self, run: RunSettings) -> Iterator[Refusal]:
        """The algorithm's own rules that `run` breaks; called with all other rules before anything starts."""
        yield from ()


def unusable(settings: AlgorithmSettings, run: RunSettings) -> Iterator[Refusal]:
    """What settings cannot say of themselves: they may be anybody's code, of which all rules ask."""

    def all_of(kind: type, found: Any) -> bool:
        return isinstance(found, tuple | list) and all(isinstance(one, kind) for one in found)

    asked: dict[str, tuple[Callable[[], Any], Callable[[Any], bool], str]] = {
        "answers_in_parts": (lambda: settings.answers_in_parts, lambda found: isinstance(found, bool), "a bool"),
        "learns_solutions": (lambda: settings.learns_solutions, lambda found: isinstance(found, bool), "a bool"),
        "kept_on_resume": (
            lambda: settings.kept_on_resume,
            lambda found: all_of(str, found),
            "a tuple of texts",
        ),
        "influence": (
            lambda: settings.influence,
            lambda found: isinstance(found, InfluenceSettings | None),
            "InfluenceSettings or None",
        ),
        "longest_prompt": (lambda: settings.longest_prompt(run), lambda found: isinstance(found, int), "an int"),
        "most_prompts": (lambda: settings.most_prompts(run), lambda found: isinstance(found, int), "an int"),
        "sequences_per_prompt": (
            lambda: settings.sequences_per_prompt(run),
            lambda found: isinstance(found, int),
            "an int",
        ),
        "adapter_optimizer": (
            lambda: settings.adapter_optimizer(run),
            lambda found: isinstance(found, OptimizerSettings | None),
            "OptimizerSettings or None",
        ),
        "parameter_sets": (
            lambda: settings.parameter_sets(run),
            lambda found: all_of(ParameterSet, found),
            "a tuple of ParameterSet",
        ),
        "served_sets": (
            lambda: settings.served_sets(run),
            lambda found: all_of(ServedSet, found),
            "a tuple of ServedSet",
        ),
        "refusals": (
            lambda: list(settings.refusals(run)),
            lambda found: all_of(Refusal, found),
            "an iterator of Refusal",
        ),
    }
    for name, (ask, fits, wanted) in asked.items():
        try:
            found = ask()
        except Exception as error:
            said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            rule = f"has settings whose {name} cannot be asked ({said})"
            yield Refusal(f"algorithm.name={settings.name}", rule, "correct its code")
            continue
        if not fits(found):
            rule = f"has settings whose {name} is {type(found).__name__}, and must be {wanted}"
            yield Refusal(f"algorithm.name={settings.name}", rule, "correct its code")


def undropped_refusals(settings: AlgorithmSettings, run: RunSettings) -> Iterator[Refusal]:
    """Settings of dynamic sampling, where it is off: no group is dropped, and no further prompt drawn."""
    cause, fix = "with algorithm.dynamic_sampling=false", "set algorithm.dynamic_sampling=true or remove it"
    yield from without_effect(settings, "algorithm", ("max_generation_batches",), cause, fix)
    if (run.batch.generation_prompts or 0) > run.batch.prompts:
        yield from without_effect(run.batch, "batch", ("generation_prompts",), cause, fix)


class ExplanationSettings(Settings):
    """Self-explanations: the policy is shown the reference answer and asked to explain it; in training the hint is
    hidden. ExPO (arXiv 2507.02834) publishes none of these settings: all of them are our choice."""

    template: str = Field(
        default="{prompt}\n\nThe correct final answer is {answer}. Reason step by step towards it, and end with "
        "\\boxed{{answer}}.",
        description="The hinted question: {prompt} becomes the question, {answer} the reference. Our choice.",
    )
    per_prompt: PositiveInt = Field(default=1, description="Explanations per prompt. Our choice.")
    max_tokens: PositiveInt | None = Field(
        default=None, description="Longest explanation in tokens; default rollout.max_tokens. Our choice."
    )
    max_prompt_tokens: PositiveInt | None = Field(
        default=None,
        description="Prompts whose hinted question is longer get no explanation and are counted; default "
        "data.max_prompt_tokens + 256. Our choice.",
    )
    answer_opening: str = Field(
        default="\\boxed{",
        min_length=1,
        description="Text that opens a final answer. The explanation's chain ends before its last occurrence; all of "
        "it is the chain where there is none. Our choice.",
    )
    answer_text: str = Field(
        default="\\boxed{{answer}}",
        description="What follows the chain in the training sequence; {answer} becomes the reference. Our choice.",
    )
    must_match: bool = Field(
        default=False, description="Train only on explanations whose own final answer is right. Our choice."
    )
    refresh_every: PositiveInt = Field(
        default=1,
        description="A prompt's explanation is used again when the prompt returns within that many steps; 1: it is "
        "made anew each time. Our choice.",
    )
    measure_every: NonNegativeInt = Field(
        default=10,
        description="Every that many steps measure likelihoods of own, self-explained and expert chains; 0: never. "
        "Our choice.",
    )
    measure_prompts: PositiveInt = Field(default=16, description="Prompts per such measurement. Our choice.")

    def refusals(self, run: RunSettings) -> Iterator[Refusal]:
        """Rules that `run` breaks."""
        for name, text, fields in (
            ("template", self.template, ("{prompt}", "{answer}")),
            ("answer_text", self.answer_text, ("{answer}",)),
        ):
            for needed in fields:
                if needed not in text:
                    yield Refusal(
                        f"algorithm.explanation.{name}={text!r}",
                        f"must contain {needed}",
                        f"put {needed} where it belongs",
                    )
        if self.answer_opening not in self.answer_text:
            yield Refusal(
                f"algorithm.explanation.answer_text={self.answer_text!r}",
                f"must contain algorithm.explanation.answer_opening={self.answer_opening!r}, so that chains end alike "
                "in explanations and in sampled answers",
                "write both for the same form of final answer",
            )
        if self.max_tokens is not None and self.max_tokens > run.rollout.max_tokens:
            yield Refusal(
                f"algorithm.explanation.max_tokens={self.max_tokens}",
                f"must not exceed rollout.max_tokens={run.rollout.max_tokens}, beyond which no response is trained",
                "lower it, or raise rollout.max_tokens",
            )
        for name, part in run.reward.named_parts():
            if part.kind == "judge" and self.must_match:
                yield Refusal(
                    "algorithm.explanation.must_match=true",
                    f"needs a reward that knows the right answer, and {name}.kind=judge gives an opinion",
                    f"set it to false, or choose another {name}.kind",
                )

    def longest_prompt(self, run: RunSettings) -> int:
        """Tokens of the longest prompt that the engine is given."""
        return max(run.data.max_prompt_tokens, self.longest_hint(run.data.max_prompt_tokens))

    def longest_hint(self, max_prompt_tokens: int) -> int:
        """`max_prompt_tokens`, or its default where questions without a hint have up to `max_prompt_tokens` tokens."""
        return self.max_prompt_tokens or max_prompt_tokens + 256
