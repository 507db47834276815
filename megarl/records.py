"""The records that travel between the floors: prompts, trajectories, training sequences.

Torch-free. Token ids are plain Python ints in tuples: they are made once by the tokenizer or the
engine and never re-tokenised.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

FinishReason = Literal["stop", "length"]
#: Who put tokens into a response: the policy; other weights of the same model; an environment; a hint; or the
#: algorithm, as a text to learn.
Source = Literal["policy", "other", "environment", "hint", "text"]
#: The kind of a worked solution of the data set.
SOLUTION = "solution"
#: The kind of a response of the demonstrations' data set.
DEMONSTRATION = "demonstration"
#: Sources whose tokens are never trained: nothing of the model's made them.
NEVER_TRAINED: frozenset[Source] = frozenset({"environment", "hint"})


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row of a data set, ready to be generated from.

    `index` is the row's position in the data file after nothing but reading (before filters), so it
    names the row for ever; `answer` is the reference, `alternatives` further references that count as
    right; `solution` a worked solution where the data set has one (what learns it needs it);
    `extra` the cells of `data.extra_columns` by their names there, None where a row has none.
    """

    index: int
    token_ids: tuple[int, ...]
    text: str
    answer: str
    source: str = ""
    solution: str | None = None
    alternatives: tuple[str, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)


class Key(NamedTuple):
    """What names a trajectory within a step.

    `prompt` is the prompt's index; `draw` how often it had been drawn before in the step; `number` counts the
    trajectories of one kind that a draw has; `kind` is the algorithm's word for what it is, such as "answer"; `branch`
    is its place below the trajectory that it goes on from: (j,) is the j-th that does.
    """

    prompt: int
    draw: int
    number: int
    kind: str = "answer"
    branch: tuple[int, ...] = ()

    def nth(self, per_draw: int) -> int:
        """Its number among all of its prompt and kind, of which every draw has `per_draw`."""
        return self.draw * per_draw + self.number


class Stretch(NamedTuple):
    """Consecutive tokens of a response, from `start` up to `end`, all from one source; `version` of the policy's
    weights that made them, in steps that these had learned from, or before which they were put; None where that says
    nothing."""

    start: int
    end: int
    source: Source
    version: int | None = None


@dataclass(frozen=True, slots=True)
class Head:
    """What all ranks know of a trajectory; the rest, its `Body`, is on rank `holder`, or on every rank where that is
    None.

    `stretches` cover the response from its first token to its last. `finish_reason` "length": it was cut at a bound.
    `reward` is None where none could be found or was asked for; `reward_terms`: of a reward that is a sum, what each
    term gave, without its weight. `marks` are places in the response by name, as numbers of tokens before them, such as
    the end of the thinking. `measured` are the numbers that the algorithm's probes found, by probe. `prompt_length` is
    that of `Body.prompt_ids` in tokens, None where the response follows the data's prompt. `fork`: where the trajectory
    goes on from another, its `parent`, so many of its first tokens are the parent's. `old_known`: of so many of its
    first tokens the body has `old_log_probs`.
    """

    key: Key
    holder: int | None
    stretches: tuple[Stretch, ...]
    finish_reason: FinishReason = "stop"
    reward: float | None = None
    reward_terms: Mapping[str, float | None] = field(default_factory=dict)
    marks: Mapping[str, int] = field(default_factory=dict)
    measured: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    prompt_length: int | None = None
    fork: int = 0
    old_known: int = 0

    @property
    def parent(self) -> Key | None:
        """The key of the trajectory that it goes on from; None where it begins at the prompt."""
        return self.key._replace(branch=self.key.branch[:-1]) if self.key.branch else None

    @property
    def length(self) -> int:
        """Tokens of the response."""
        return self.stretches[-1].end if self.stretches else 0

    @property
    def finished(self) -> bool:
        """False where the response was cut at a bound."""
        return self.finish_reason == "stop"


@dataclass(frozen=True, slots=True)
class Body:
    """What the holder of a trajectory has.

    `token_ids` (T,) are the response's ids, the end token included where the engine stopped on it; `log_probs` (T,) the
    engine's log-probs of these ids in nats under the sampling distribution, NaN where an environment put them, empty
    where no engine made any; `seed` the sample's own seed, see `rollout.seeds`. `counters`: what was counted when it
    was made and graded. `prompt_ids` are the prompt's where an environment asked something of its own; `texts` those of
    the stretches, where an environment answered. `routed_experts`: see `Sequence`; not saved. `old_log_probs`
    (`Head.old_known`,) are those under the policy's weights that wrote the tokens, measured before these changed; NaN
    at tokens that nobody trains.
    """

    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...] = ()
    text: str = ""
    seed: int = 0
    counters: Mapping[str, int] = field(default_factory=dict)
    prompt_ids: tuple[int, ...] | None = None
    texts: tuple[str, ...] = ()
    routed_experts: np.ndarray | None = field(default=None, compare=False, repr=False)
    old_log_probs: tuple[float, ...] = ()


class Trajectory(NamedTuple):
    """One response to a prompt, from its generation to training."""

    head: Head
    body: Body


@dataclass(slots=True)
class Sequence:
    """One training sequence: its tokens, which of them are trained, and values of these.

    `tokens` int32 (L,); `positions` int32 (T,): the places of the trained tokens in it, ascending, from 1 on, as
    nothing predicts the first. All others are context, also those between trained ones, which an environment or a hint
    has put there.
    The values are float32 (T,), None where not known: `advantages`; `rollout_log_probs`, the engine's;
    `old_log_probs`, of the policy before the step's first update, and `log_probs_under`, by the name of a parameter
    set, which the policy measures where an objective needs them (on the last pipeline stage only). Old log-probs of
    tokens that an earlier step's weights have written may be known from that step, on all ranks; then they are NaN at
    the others until the policy is measured. `old_wrote`: the weights of the old log-probs have written all that is
    trained of it. `kind` says what the sequence is:
    an "answer", an "explanation", a "solution", or whatever an algorithm calls its own. `temperature` is that of the
    distribution that its log-probs are of. `group` is shared by the sequences of a prompt; `signals` are further
    numbers of a sampled answer, by name. `routed_experts` int16 (N, sparse layers, k), N <= L: the experts that the
    engine chose for the first N tokens, -1 where not known.

    Raises:
        ValueError: positions that do not ascend from 1 or more within the tokens, or values of another number.
    """

    tokens: np.ndarray
    positions: np.ndarray
    advantages: np.ndarray | None = None
    rollout_log_probs: np.ndarray | None = None
    old_log_probs: np.ndarray | None = None
    log_probs_under: dict[str, np.ndarray] = field(default_factory=dict)
    old_wrote: bool = False
    kind: str = "answer"
    temperature: float = 1.0
    group: int = 0
    signals: dict[str, float] = field(default_factory=dict)
    routed_experts: np.ndarray | None = None

    def __post_init__(self) -> None:
        ends = np.concatenate([[0], self.positions, [self.length]])
        if (np.diff(ends) <= 0).any():
            raise ValueError(f"trained positions {self.positions} of {self.length} tokens must ascend from 1 or more")
        values = {name: getattr(self, name) for name in VALUES} | self.log_probs_under
        for name, value in values.items():
            if value is not None and len(value) != self.trained:
                raise ValueError(f"{len(value)} {name} of {self.trained} trained tokens")

    @property
    def length(self) -> int:
        """L, in tokens."""
        return len(self.tokens)

    @property
    def trained(self) -> int:
        """T, in tokens."""
        return len(self.positions)


#: The values per trained token that a sequence may have, beside those under other parameter sets.
VALUES = ("advantages", "rollout_log_probs", "old_log_probs")


def from_place(start: int, end: int) -> np.ndarray:
    """The positions of a sequence whose tokens from `start` to `end` are all trained, int32.

    >>> from_place(2, 5)
    array([2, 3, 4], dtype=int32)
    """
    return np.arange(start, end, dtype=np.int32)
