"""From generated tokens to rewards: decode, separate the thinking, grade."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from megarl.config.sections import RewardSettings
from megarl.records import FinishReason, Prompt
from megarl.rewards.grader import GradingItem
from megarl.rewards.scorer import Scorer
from megarl.train.generation import Output
from megarl.train.session import Session


@dataclass(slots=True)
class Graded:
    """An output as text, its reward (None where none could be found), and what was counted on the way.

    `thinking_length` is None where the output is not one thinking and a response, or was not separated.
    """

    text: str
    reward: float | None
    thinking_length: int | None = None
    counters: dict[str, int] = field(default_factory=dict)

    def count(self, name: str) -> None:
        """Add one to a counter."""
        self.counters[name] = self.counters.get(name, 0) + 1


@dataclass(frozen=True, slots=True)
class _Part:
    """What one reward is found for: the response `tokens` of output `output`."""

    output: int
    tokens: tuple[int, ...]


def grade(
    session: Session, scorer: Scorer, prompts: Sequence[Prompt], outputs: Sequence[Output], settings: RewardSettings
) -> list[Graded]:
    """Rewards of outputs, one prompt each, by `scorer`, whose settings are `settings`.

    Where the rewards see the response alone, and where the algorithm trains by parts, an output that is not one
    thinking and a response gets the floor, `reward.low`, and is counted. The reward of several responses to a thinking
    is their mean. Raises `ScoringStopped` where the judge cannot be asked any more.
    """
    graded = [Graded(session.tokenizer.decode(output.completion.token_ids), None) for output in outputs]
    rewards: list[list[float | None]] = [[] for _ in outputs]
    parts: list[_Part] = []
    for number, output in enumerate(outputs):
        for tokens, context, reason in _responses(output):
            seen = _seen(session, settings, graded[number], context, tokens)
            if seen is None or (settings.truncated == "zero" and reason == "length"):
                rewards[number].append(settings.low)
            else:
                parts.append(_Part(number, seen))
    texts = [session.tokenizer.decode(part.tokens) for part in parts]
    if settings.last_characters is not None:
        texts = [text[-settings.last_characters :] for text in texts]
    items = [GradingItem.of(prompts[part.output], text) for part, text in zip(parts, texts, strict=True)]
    for part, answer in zip(parts, scorer.grade(items), strict=True):
        rewards[part.output].append(answer.reward)
        if answer.counter:
            graded[part.output].count(answer.counter)
    for one, found in zip(graded, rewards, strict=True):
        known = [reward for reward in found if reward is not None]
        one.reward = sum(known) / len(known) if len(known) == len(found) else None
    return graded


def _responses(output: Output) -> list[tuple[tuple[int, ...], tuple[int, ...], FinishReason]]:
    """The parts of an output that a reward is found for: tokens, the thinking before them, how they ended."""
    whole = output.completion
    if not output.responses:
        return [(whole.token_ids, (), whole.finish_reason)]
    thinking = whole.token_ids[: len(whole.token_ids) - len(output.responses[0].token_ids)]
    return [(response.token_ids, thinking, response.finish_reason) for response in output.responses]


def _seen(
    session: Session, settings: RewardSettings, graded: Graded, thinking: tuple[int, ...], tokens: tuple[int, ...]
) -> tuple[int, ...] | None:
    """The tokens that the reward sees of an output or of a response to `thinking`; None where there are none to see."""
    if settings.graded == "whole" and not session.algorithm.needs.thinking:
        return tokens
    split = session.thinking_end.split((*thinking, *tokens))
    if isinstance(split, str):
        graded.count(split)
        if thinking and split in ("thinking_repeated", "thinking_unanswered"):
            # The response's fault; the thinking itself is whole.
            graded.thinking_length = len(thinking)
        return None
    graded.thinking_length = split
    return (*thinking, *tokens)[split:] if settings.graded == "response" else tokens
