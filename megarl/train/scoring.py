"""From generated tokens to rewards: decode, separate the thinking, grade."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from megarl.config.rewards import ScoreSettings
from megarl.records import FinishReason, Prompt
from megarl.rewards.grader import GradingItem
from megarl.rewards.scorer import Part, Scoring
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
    terms: dict[str, float | None] = field(default_factory=dict)
    """What each term of a sum gave."""

    def count(self, name: str) -> None:
        """Add one to a counter."""
        self.counters[name] = self.counters.get(name, 0) + 1


@dataclass(frozen=True, slots=True)
class _Response:
    """What one reward is found for: the response `tokens` of output `output`."""

    output: int
    tokens: tuple[int, ...]


def grade(session: Session, scoring: Scoring, prompts: Sequence[Prompt], outputs: Sequence[Output]) -> list[Graded]:
    """Rewards of outputs, one prompt each.

    Of a sum each term is found for itself, by settings of its own. Raises as `_grade_part`.
    """
    found = [_grade_part(session, part, prompts, outputs) for part in scoring.parts]
    return [_added_up(scoring, ones) for ones in zip(*found, strict=True)] if scoring.terms else found[0]


def term_means(answers: Iterable[Mapping[str, float | None]]) -> dict[str, float]:
    """The mean of each term of a sum over the answers for which it was found; empty where the reward is no sum."""
    found: dict[str, list[float]] = {}
    for terms in answers:
        for name, reward in terms.items():
            if reward is not None:
                found.setdefault(name, []).append(reward)
    return {name: fmean(rewards) for name, rewards in found.items()}


def _added_up(scoring: Scoring, ones: Sequence[Graded]) -> Graded:
    """An output with what each term gave it. Counted are outputs: one that two terms count alike counts once."""
    rewards = [one.reward for one in ones]
    counters: Counter[str] = Counter()
    for one in ones:
        counters |= Counter(one.counters)
    thinking = next((one.thinking_length for one in ones if one.thinking_length is not None), None)
    terms = dict(zip(scoring.terms, rewards, strict=True))
    return Graded(ones[0].text, scoring.total(rewards), thinking, dict(counters), terms)


def _grade_part(session: Session, part: Part, prompts: Sequence[Prompt], outputs: Sequence[Output]) -> list[Graded]:
    """Rewards of outputs by one part of the reward.

    Where the rewards see the response alone, and where the algorithm trains by parts, an output that is not one
    thinking and a response gets the floor, `reward.low`, and is counted. The reward of several responses to a thinking
    is their mean. Raises `ScoringStopped` where the judge cannot be asked any more.
    """
    settings = part.settings
    graded = [Graded(session.tokenizer.decode(output.completion.token_ids), None) for output in outputs]
    rewards: list[list[float | None]] = [[] for _ in outputs]
    responses: list[_Response] = []
    for number, output in enumerate(outputs):
        for tokens, context, reason in _responses(output):
            seen = _seen(session, settings, graded[number], context, tokens)
            if seen is None or (settings.truncated == "zero" and reason == "length"):
                rewards[number].append(settings.low)
            else:
                responses.append(_Response(number, seen))
    texts = [session.tokenizer.decode(response.tokens) for response in responses]
    if settings.last_characters is not None:
        texts = [text[-settings.last_characters :] for text in texts]
    items = [GradingItem.of(prompts[one.output], text) for one, text in zip(responses, texts, strict=True)]
    for response, answer in zip(responses, part.scorer.grade(items), strict=True):
        rewards[response.output].append(answer.reward)
        if answer.counter:
            graded[response.output].count(answer.counter)
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
    session: Session, settings: ScoreSettings, graded: Graded, thinking: tuple[int, ...], tokens: tuple[int, ...]
) -> tuple[int, ...] | None:
    """The tokens that the reward sees of an output or of a response to `thinking`; None where there are none to see."""
    if settings.graded == "whole" and not session.algorithm.splits_thinking:
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
