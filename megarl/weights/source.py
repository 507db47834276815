"""Where weights are read that leave the policy: a push and an export ask a source for a rank's tensors, by name.

What a run trains need not be what it serves: an adapter is merged, a weight quantised, on the way out. Each is a
source; whoever moves weights knows none of it.
"""

from __future__ import annotations

from typing import Protocol

import torch

from megarl.policy.policy import Policy


class WeightSource(Protocol):
    """A rank's tensors by the names that a plan has for them; a dictionary of tensors is one too.

    A plan is in rounds, and a tensor is asked for in each round that has a part of it. One that is computed, if the
    mover is told so, is asked for once in a round where it is sent, and kept until another one is asked for. It is
    computed whole, so that its bits do not depend on which part is wanted. The mover casts parts to the type that
    travels. What comes is read, never written, and is that of the weights as they are when it is asked for.
    """

    def __getitem__(self, name: str, /) -> torch.Tensor:
        """The tensor `name` in this rank's shape. Raises `KeyError` for a name that the rank does not hold."""
        ...


class PolicyWeights:
    """The weights that the policy computes with, under whichever set: with an adapter they are merged.

    `merged` are the names of those that were, since it was last cleared: a push asks whether any was left out.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.merged: set[str] = set()

    def __getitem__(self, name: str, /) -> torch.Tensor:
        """The parameter itself, no copy, or where it has an adapter what the two are together."""
        if name in self._policy.adapted:
            self.merged.add(name)
        return self._policy.weight(name)
