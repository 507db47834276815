"""The base of every configuration record."""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Frozen and closed: unknown keys are refused; types are not coerced beyond YAML's own."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, validate_default=True, allow_inf_nan=False)
