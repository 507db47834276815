"""How the influence of a sequence's steps on the later ones is measured, for algorithms that ask for it."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field, NonNegativeInt, PositiveInt

from megarl.config.base import Settings
from megarl.errors import Refusal


class InfluenceSettings(Settings):
    """The forward context influence of AttnRL (arXiv 2509.26628): see `megarl.policy.influence`."""

    distance: PositiveInt = Field(
        default=4,
        description="Steps behind from which on a step's attention counts. The paper's.",
    )
    query_block: PositiveInt = Field(
        default=64,
        description="Queries whose attention is made at a time: more take more memory and are faster. Our choice.",
    )
    layers: tuple[NonNegativeInt, ...] | None = Field(
        default=None,
        description="Numbers of the layers that are looked at, from 0; default all, as in the paper. Fewer are our "
        "choice.",
    )
    heads: tuple[NonNegativeInt, ...] | None = Field(
        default=None,
        description="Numbers of the query heads that are looked at in each of these layers, from 0; default all, as in "
        "the paper. Fewer are our choice.",
    )

    def refusals(self, key: str, num_layers: int, num_heads: int) -> Iterator[Refusal]:
        """What a model of `num_layers` layers with `num_heads` query heads each does not have; `key` is that of these
        settings, such as algorithm.attention."""
        for name, chosen, number in (("layers", self.layers, num_layers), ("heads", self.heads, num_heads)):
            if chosen is None:
                continue
            value = f"{key}.{name}=[{', '.join(map(str, chosen))}]"
            if not chosen:
                yield Refusal(value, "leaves nothing to look at", f"name some, or remove it to look at all {number}")
            elif max(chosen) >= number:
                rule = f"must be numbers of the model's {number} {name}, 0 to {number - 1}"
                yield Refusal(value, rule, "correct them, or remove it to look at all")
