"""The records that travel between the floors: prompts, samples, training sequences.

Torch-free. Token ids are plain Python ints in tuples: they are made once by the tokenizer or the
engine and never re-tokenised.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

FinishReason = Literal["stop", "length"]
#: What a sample is: an answer to the prompt's question, or to its hinted question.
SampleKind = Literal["answer", "explanation"]


#: Whose tokens they are: the policy's, other weights', an environment's, a hint's, or a text's that is to be learned.
Source = Literal["policy", "other", "environment", "hint", "text"]


class Stretch(NamedTuple):
    """Consecutive tokens of a response, from `start` up to `end`: whose they are, and the `version` of the weights that
    made them, or before which they were put."""

    start: int
    end: int
    source: Source
    version: int


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row of a data set, ready to be generated from.

    `index` is the row's position in the data file after nothing but reading (before filters), so it
    names the row for ever; `answer` is the reference, `alternatives` further references that count as
    right; `solution` a worked solution where the data set has one (supervised training needs it);
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


@dataclass(frozen=True, slots=True)
class Sample:
    """One sampled answer to a prompt.

    `token_ids` (T,) are the response's ids, the end token included where the engine stopped on it;
    `rollout_log_probs` (T,) the engine's log-probs of these ids in nats under the sampling
    distribution; `seed` the sample's own seed, see `rollout.seeds`. `reward` is None where none could be found.
    `thinking_length`: tokens up to the end of the thinking, None where it was not asked for or there is none.
    `reward_terms`: of a reward that is a sum, what each term gave, without its weight. `routed_experts`: see
    `Sequence`; not saved with the sample.
    """

    prompt_index: int
    sample_index: int
    token_ids: tuple[int, ...]
    rollout_log_probs: tuple[float, ...]
    finish_reason: FinishReason
    seed: int = 0
    text: str = ""
    reward: float | None = 0.0
    kind: SampleKind = "answer"
    thinking_length: int | None = None
    reward_counters: dict[str, int] = field(default_factory=dict)
    reward_terms: dict[str, float | None] = field(default_factory=dict)
    routed_experts: np.ndarray | None = field(default=None, compare=False, repr=False)


@dataclass(slots=True)
class Sequence:
    """One training sequence: context and trained tokens, with per-token values of the latter.

    `tokens` int32 (P+T,): the context (the prompt, and what of the response is not trained), then the trained tokens;
    `prompt_length` = P >= 1. The values are float32 (T,): `advantages`; `rollout_log_probs`, None where no engine
    made the response; `old_log_probs` and `reference_log_probs`, filled by the policy where the algorithm needs them
    (on the last pipeline stage only). `signals` are further numbers of a sampled answer, by name. A `target` is a text
    whose likelihood is to rise: of the values it has the reference log-probs alone. `group` and `sample` say where the
    sequence came from. `routed_experts` int16 (N, sparse layers, k), N <= P+T: the experts that the engine chose for
    the first N tokens, -1 where not known.
    """

    tokens: np.ndarray
    prompt_length: int
    advantages: np.ndarray
    rollout_log_probs: np.ndarray | None = None
    old_log_probs: np.ndarray | None = None
    reference_log_probs: np.ndarray | None = None
    group: int = 0
    sample: int = 0
    target: bool = False
    signals: dict[str, float] = field(default_factory=dict)
    routed_experts: np.ndarray | None = None

    @property
    def length(self) -> int:
        """P + T, in tokens."""
        return len(self.tokens)

    @property
    def response_length(self) -> int:
        """T, in tokens."""
        return len(self.tokens) - self.prompt_length
