"""The base of every configuration record, and the types that their fields share."""

import os
from collections.abc import Iterator
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict

from megarl.errors import Refusal


class Settings(BaseModel):
    """Frozen and closed: unknown keys are refused; types are not coerced beyond YAML's own."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, validate_default=True, allow_inf_nan=False)


def without_effect(
    settings: Settings, section: str, names: tuple[str, ...], cause: str, fix: str = "remove it"
) -> Iterator[Refusal]:
    """A refusal of each of these settings that is not at its default: `cause`, as in "with x=y", takes its effect.

    `section` is the key of `settings`.
    """
    for name in names:
        value = getattr(settings, name)
        if value == type(settings).model_fields[name].default:
            continue
        shown = str(value)
        if isinstance(value, bool):
            shown = shown.lower()
        elif isinstance(value, float):
            shown = f"{value:g}"
        elif isinstance(value, tuple):
            shown = f"[{', '.join(map(str, value))}]"
        yield Refusal(f"{section}.{name}={shown}", f"has no effect {cause}", fix)


#: The path of a file or folder, or a name that may stand in a path's place: a leading ~ is the user's home.
PathText = Annotated[str, AfterValidator(os.path.expanduser)]
