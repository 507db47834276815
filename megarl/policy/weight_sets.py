"""Named copies of the policy's weights: the reference policy, and whatever an algorithm keeps beside."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from megarl.errors import MegarlError


class WeightSets:
    """Copies of this rank's shard by name, kept in host memory."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self._sets: dict[str, list[torch.Tensor]] = {}

    def keep(self, name: str) -> None:
        """Copy the current weights under `name`, replacing an earlier set of that name."""
        self._sets[name] = [p.detach().to("cpu", copy=True) for p in self._parameters]

    def names(self) -> tuple[str, ...]:
        """Names of the sets kept."""
        return tuple(self._sets)

    @contextmanager
    def using(self, name: str) -> Iterator[None]:
        """Run with set `name` in place of the weights; the weights come back whatever happens."""
        if name not in self._sets:
            raise MegarlError(f"no weight set named {name!r} is kept; kept are {list(self._sets)}")
        # Only the pointers change hands: the optimizer's buffers, of which parameters are views, stay as they are.
        own = [p.data for p in self._parameters]
        try:
            for parameter, kept in zip(self._parameters, self._sets[name], strict=True):
                parameter.data = kept.to(parameter.device)
            yield
        finally:
            for parameter, data in zip(self._parameters, own, strict=True):
                parameter.data = data
