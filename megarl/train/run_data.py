"""The prompts of a run: those that it trains on, in their order, demonstrations, and those that evaluations ask."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megarl.config.data import DEMONSTRATIONS
from megarl.config.implied import Implied
from megarl.config.schema import RunConfig
from megarl.data.dataset import LoadedPrompts, demonstration_data, evaluation_data, training_data
from megarl.data.sampler import MixedStream, PromptStream
from megarl.data.tokenizer import Tokenizer, response_ids
from megarl.errors import Refusal, TrainingStopped
from megarl.records import Prompt
from megarl.train import differences


@dataclass
class RunData:
    """`held_out` is None where nothing is evaluated, `demonstrations` where none are learned; `stream` is the order of
    what is trained on."""

    training: LoadedPrompts
    held_out: LoadedPrompts | None
    stream: PromptStream | MixedStream
    demonstrations: Demonstrations | None = None

    def draw(self, size: int) -> list[Prompt]:
        """The next prompts to train on."""
        return [self.training.prompts[place] for place in self.stream.take(size)]

    @property
    def other_streams(self) -> dict[str, PromptStream | MixedStream]:
        """The orders of what is learned beside, by the names that checkpoints have for them."""
        return {} if self.demonstrations is None else {"demonstrations": self.demonstrations.stream}

    @cached_property
    def rows(self) -> dict[str, Any]:
        """Number and digest of the prompts that are trained on (`differences.rows_of`)."""
        return differences.rows_of(self.training.prompts)

    @cached_property
    def held_out_in_training(self) -> int:
        """How many of the held-out prompts are among those that are trained on, by their texts."""
        trained = {prompt.text for prompt in self.training.prompts}
        return sum(prompt.text in trained for prompt in self.held_out.prompts) if self.held_out else 0


def load(
    config: RunConfig, tokenizer: Tokenizer, *, need_solution: bool, evaluates: bool, demonstrations: int = 0
) -> RunData:
    """Read what the configuration names. `need_solution`: rows that are trained on must have worked solutions;
    `demonstrations`: so many are learned in a step. Raises `Refusal` for data that cannot be used."""
    training = training_data(config, tokenizer, need_solution=need_solution)
    held_out = evaluation_data(config, tokenizer) if evaluates else None
    found = RunData(training, held_out, _stream(config, training))
    if demonstrations:
        found.demonstrations = Demonstrations.load(config, tokenizer, demonstrations)
    return found


class Demonstrations:
    """Questions with the responses that are learned, and their order, which is that of a stream of their own."""

    def __init__(self, data: LoadedPrompts, stream: PromptStream | MixedStream, tokenizer: Tokenizer, longest: int):
        self.data, self.stream = data, stream
        self._tokenizer, self._longest = tokenizer, longest
        # Rows that were found to be.
        self._too_long: set[int] = set()

    @classmethod
    def load(cls, config: RunConfig, tokenizer: Tokenizer, per_step: int) -> Demonstrations:
        """Read what the configuration names. Raises `Refusal` where it has fewer than the `per_step` of a step."""
        data = demonstration_data(config, tokenizer)
        if len(data.prompts) < per_step:
            raise Refusal(
                f"{DEMONSTRATIONS} of {len(data.prompts)} rows",
                f"must have the {per_step} that a step learns",
                f"set batch.demonstrations to {len(data.prompts)} at most, or give more rows",
            )
        return cls(data, _stream(config, data, "demonstrations"), tokenizer, Implied(config).longest_demonstration)

    def draw(self, count: int) -> tuple[list[tuple[Prompt, tuple[int, ...]]], dict[str, int]]:
        """The next `count` with their responses' ids, and how many were passed over as too long.

        Raises `TrainingStopped` where fewer rows than that are left that may fit.
        """
        found: list[tuple[Prompt, tuple[int, ...]]] = []
        passed_over = 0
        while len(found) < count:
            place = self.stream.take(1)[0]
            prompt = self.data.prompts[place]
            assert prompt.solution is not None
            ids = response_ids(self._tokenizer, prompt.solution)
            if len(ids) <= self._longest:
                found.append((prompt, tuple(ids)))
                continue
            passed_over += 1
            self._too_long.add(place)
            if len(self.data.prompts) - len(self._too_long) < count:
                raise TrainingStopped(
                    f"fewer than the {count} responses that a step learns are left of {DEMONSTRATIONS}: "
                    f"{len(self._too_long)} of its {len(self.data.prompts)} rows have one of more than {self._longest} "
                    f"tokens. Fix: raise {DEMONSTRATIONS}.max_tokens, or give more rows"
                )
        return found, {"demonstrations_too_long": passed_over}

    @cached_property
    def rows(self) -> dict[str, Any]:
        """Number and digest of the rows (`differences.rows_of`)."""
        return differences.rows_of(self.data.prompts)


def _stream(config: RunConfig, data: LoadedPrompts, name: str = "prompts") -> PromptStream | MixedStream:
    """The order of the prompts: all as one, or parts with weights."""
    weights = [part.weight for part in data.parts if part.weight is not None]
    if not weights:
        return PromptStream(len(data.prompts), config.seed, config.data.shuffle, name)
    return MixedStream([part.count for part in data.parts], weights, config.seed, config.data.shuffle, name)
