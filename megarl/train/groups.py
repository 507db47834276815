"""The groups of a step, as the ranks know them while they are made and trained on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from megarl.algorithms.base import GroupOutcome
from megarl.records import Prompt, Sample


@dataclass(frozen=True, slots=True)
class Target:
    """What all ranks know of a text to learn, number `number` of its group: its tokens, of which the first
    `chain_length` are the chain that leads to the answer, are on rank `holder`."""

    number: int
    holder: int
    length: int
    chain_length: int


@dataclass(frozen=True, slots=True)
class Score:
    """What all ranks know of an answer. `reward` is None where none could be found; `reward_terms` is what each term of
    a sum gave."""

    reward: float | None
    length: int
    finished: bool
    holder: int
    thinking_length: int | None = None
    reward_terms: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(slots=True)
class Rollouts:
    """The groups of a step. Sample k of group g has the number g·G+k.

    On all ranks: `scores` of every sample, `targets` by group, `shown`, the first few samples with their texts, and
    `kept`, the groups to train on. On this rank: `mine`, the samples, and `explanations`, the explanations it holds,
    with `my_targets`, the training tokens made of them, by (group, number).
    """

    group_size: int
    prompts: list[Prompt] = field(default_factory=list)
    scores: dict[int, Score] = field(default_factory=dict)
    targets: dict[int, list[Target]] = field(default_factory=dict)
    shown: list[Sample] = field(default_factory=list)
    counters: dict[str, int] = field(default_factory=dict)
    kept: list[int] = field(default_factory=list)
    mine: dict[int, Sample] = field(default_factory=dict)
    explanations: list[Sample] = field(default_factory=list)
    my_targets: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)
    generated_tokens: Counter[str] = field(default_factory=Counter)
    """Tokens made by all engines, by kind of sample."""
    reward_failure: str | None = None
    """How the reward failed on an answer, where a rank saw that for the first time."""
    _earlier: list[int] = field(default_factory=list)
    _drawn: Counter[int] = field(default_factory=Counter)

    def outcome(self, group: int) -> GroupOutcome:
        """A group's metadata, in sample order. Every sample must have a reward."""
        scores = self.scores_of(group)
        return GroupOutcome(
            tuple(s.reward for s in scores if s.reward is not None),
            tuple(s.length for s in scores),
            tuple(s.finished for s in scores),
            tuple(s.thinking_length for s in scores),
        )

    def scores_of(self, group: int) -> list[Score]:
        """The scores of a group's samples, in order."""
        return [self.scores[group * self.group_size + k] for k in range(self.group_size)]

    def count(self, name: str, amount: int = 1) -> None:
        """Add to a counter of the step."""
        if amount:
            self.counters[name] = self.counters.get(name, 0) + amount

    def draw(self, prompts: Iterable[Prompt]) -> None:
        """Add groups for `prompts`."""
        for prompt in prompts:
            self._earlier.append(self._drawn[prompt.index])
            self._drawn[prompt.index] += 1
            self.prompts.append(prompt)

    def sample_index(self, group: int, number: int, per_prompt: int) -> int:
        """The index of a prompt's sample: those of a prompt that was drawn again go on where its last group ended."""
        return self._earlier[group] * per_prompt + number
