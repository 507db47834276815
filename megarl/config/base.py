"""The base of every configuration record, and the types that their fields share."""

import os
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict


class Settings(BaseModel):
    """Frozen and closed: unknown keys are refused; types are not coerced beyond YAML's own."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, validate_default=True, allow_inf_nan=False)


#: The path of a file or folder, or a name that may stand in a path's place: a leading ~ is the user's home.
PathText = Annotated[str, AfterValidator(os.path.expanduser)]
