"""Models that others serve over the OpenAI-compatible protocol: where they are, and how they are asked. Torch-free."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, field_validator

from megarl.config.base import Settings


class ServerSettings(Settings):
    """A server and the manners in which it is asked. All are our choice."""

    url: str = Field(description="Base URL of the server, http or https, as in http://host:8000/v1.")
    model: Annotated[str, Field(min_length=1)] = Field(description="Name of the model, as the server knows it.")
    api_key_env: str | None = Field(
        default=None, description="Environment variable that holds the key; none: no key is sent."
    )
    concurrency: Annotated[int, Field(ge=1, le=1000)] = Field(default=32, description="Requests in flight per replica.")
    time_limit: PositiveFloat = Field(default=60.0, description="Seconds per request, from sending to the whole reply.")
    retries: NonNegativeInt = Field(
        default=3, description="How often the same is asked again after a failed request or a reply of no use."
    )
    patience: NonNegativeFloat = Field(
        default=600.0,
        description="Seconds the run waits, asking again, while nobody can reach the server; then it stops.",
    )

    @field_validator("url")
    @classmethod
    def _is_base_url(cls, url: str) -> str:
        if re.fullmatch(r"https?://[^\s/@?#]+(/[^\s?#]*)?", url) is None:
            raise ValueError("must be http://host[:port]/path or https://..., without user name, query or blanks")
        return url


class LogProbServerSettings(ServerSettings):
    """A server that gives the log-probs of a prompt's tokens (`echo` with `logprobs`, as vLLM's), of a model with this
    run's tokenizer."""

    max_failed_share: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.2,
        description="Share of the sequences that may stay without log-probs, which leaves them out of the update, "
        "before the run stops; of the last hundred, or of those asked about together where these are more. Our choice.",
    )
