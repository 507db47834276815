"""Sets of weights by name: the policy's own, and those that a run keeps or trains beside them. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from megarl.config.servers import LogProbServerSettings
from megarl.errors import Refusal

#: The weights that the run is about.
POLICY = "policy"
#: An adapter's, where it trains beside the policy's own weights; the policy is both.
ADAPTER = "adapter"
#: The base that learns from rollouts alone, beside that of BRIDGE's policy.
SHADOW = "shadow"
#: The weights as they were when the run began.
REFERENCE = "reference"
#: The weights of the policy that answers the trained one's thinking in evaluations, where they are a checkpoint's.
CONSUMER = "consumer"

#: The weights that a policy is distilled from.
TEACHER = "teacher"


@dataclass(frozen=True, slots=True)
class ParameterSet:
    """Weights of the policy's model beside the policy's own, known by their name; what has none of a checkpoint is the
    run's start. They stay as they are, unless the set `trains`."""

    name: str
    checkpoint: str | None = None
    """Where the weights come from; None: those that the run begins with."""
    setting: str = ""
    """The setting that names `checkpoint`."""
    generates: bool = False
    """Whether the engine is filled with it at times."""
    measures: bool = False
    """Whether log-probs are computed under it."""
    trains: bool = False
    """Whether objectives train it: it has gradients, an optimizer and a schedule of its own, as the policy's have."""
    rebuilt: bool = False
    """Of a set that trains: before each of its steps it gets the policy's weights of that time."""

    @property
    def weights(self) -> str:
        """Whose weights they are, in words."""
        start = "the run's start" if self.checkpoint is None else self.checkpoint
        named = f"{self.setting}={start}" if self.setting and self.checkpoint else start
        return f"{named}, which trains" if self.trains else named


@dataclass(frozen=True, slots=True)
class ServedSet:
    """Weights that somebody else serves, known by their name: this run asks for log-probs under them."""

    name: str
    server: LogProbServerSettings
    setting: str
    """The key of `server` in the run's file."""


def united(sets: Iterable[ParameterSet]) -> tuple[ParameterSet, ...]:
    """`sets` with one of each name, which serves for all that those of its name serve for.

    Raises:
        Refusal: two of one name have other weights.
    """
    found: dict[str, ParameterSet] = {}
    for one in sets:
        other = found.get(one.name, one)
        if (other.checkpoint, other.trains, other.rebuilt) != (one.checkpoint, one.trains, one.rebuilt):
            raise Refusal(
                f"the parameter set {one.name!r}",
                f"must be one set of weights, and is {other.weights} as well as {one.weights}",
                "give them names of their own",
            )
        found[one.name] = replace(
            one,
            generates=one.generates or other.generates,
            measures=one.measures or other.measures,
        )
    return tuple(found.values())
