"""What answers the policy while it generates: the section `rollout.environment`. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field, JsonValue, PositiveFloat, PositiveInt

from megarl.config import user_code
from megarl.config.base import Settings
from megarl.errors import Refusal

#: Environments of megarl's own, by name.
BUILTIN_KINDS = {
    "calculator": "megarl.environments.calculator:Calculator",
    "retry": "megarl.environments.retry:Retry",
}


class EnvironmentSettings(Settings):
    """An environment of several turns. All bounds are our choice."""

    kind: str = Field(
        description="calculator: a call <tool>12*34</tool> is answered <result>408</result>; retry: the reward's "
        "verdict is told and the policy may try again; or a class of your own, package.module:Class or "
        "folder/file.py:Class."
    )
    arguments: dict[str, JsonValue] = Field(default={}, description="What the class is called with, by name.")
    max_turns: PositiveInt = Field(default=4, description="Most turns of the policy's in one sample.")
    max_turn_tokens: PositiveInt | None = Field(
        default=None, description="Longest turn of the policy's in tokens; default: what is left of rollout.max_tokens."
    )
    time_limit: PositiveFloat = Field(
        default=10.0,
        description="Seconds per call of the environment; past it the sample scores reward.low and is counted.",
    )
    workers: PositiveInt = Field(
        default=256,
        description="Most processes with environments per engine replica, each with that of one sample at a time: so "
        "many samples are under way at once. They are forked from one more, which has imported the class.",
    )
    in_order: bool = Field(
        default=False,
        description="The engine waits for all replies before it goes on, so that a run repeats to the last bit; a slow "
        "environment then holds it up.",
    )


def refusals(settings: EnvironmentSettings, max_tokens: int) -> Iterator[Refusal]:
    """The rules within the section, and beside `rollout.max_tokens`."""
    name = "rollout.environment"
    if settings.kind not in BUILTIN_KINDS and not user_code.FORM.fullmatch(settings.kind):
        rule = f"must be {', '.join(BUILTIN_KINDS)}, package.module:Class or folder/file.py:Class"
        yield Refusal(f"{name}.kind={settings.kind}", rule, f"correct {name}.kind")
    if settings.max_turn_tokens is not None and settings.max_turn_tokens > max_tokens:
        yield Refusal(
            f"{name}.max_turn_tokens={settings.max_turn_tokens}",
            f"must not exceed rollout.max_tokens={max_tokens}, which bounds all turns and observations together",
            "lower it, or leave it out",
        )
