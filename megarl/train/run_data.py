"""The prompts of a run: those that it trains on, in their order, and those that evaluations ask."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from megarl.config.schema import RunConfig
from megarl.data.dataset import LoadedPrompts, evaluation_data, training_data
from megarl.data.sampler import MixedStream, PromptStream
from megarl.data.tokenizer import Tokenizer
from megarl.records import Prompt
from megarl.train import differences


@dataclass
class RunData:
    """`held_out` is None where nothing is evaluated; `stream` is the order of what is trained on."""

    training: LoadedPrompts
    held_out: LoadedPrompts | None
    stream: PromptStream | MixedStream

    def draw(self, size: int) -> list[Prompt]:
        """The next prompts to train on."""
        return [self.training.prompts[place] for place in self.stream.take(size)]

    @cached_property
    def rows(self) -> dict[str, Any]:
        """Number and digest of the prompts that are trained on (`differences.rows_of`)."""
        return differences.rows_of(self.training.prompts)

    @cached_property
    def held_out_in_training(self) -> int:
        """How many of the held-out prompts are among those that are trained on, by their texts."""
        trained = {prompt.text for prompt in self.training.prompts}
        return sum(prompt.text in trained for prompt in self.held_out.prompts) if self.held_out else 0


def load(config: RunConfig, tokenizer: Tokenizer, *, need_solution: bool, evaluates: bool) -> RunData:
    """Read what the configuration names. `need_solution`: rows that are trained on must have worked solutions. Raises
    `Refusal` for data that cannot be used."""
    training = training_data(config, tokenizer, need_solution=need_solution)
    held_out = evaluation_data(config, tokenizer) if evaluates else None
    return RunData(training, held_out, _stream(config, training))


def _stream(config: RunConfig, data: LoadedPrompts) -> PromptStream | MixedStream:
    """The order of the prompts: all as one, or parts with weights."""
    weights = [part.weight for part in data.parts if part.weight is not None]
    if not weights:
        return PromptStream(len(data.prompts), config.seed, config.data.shuffle)
    return MixedStream([part.count for part in data.parts], weights, config.seed, config.data.shuffle)
