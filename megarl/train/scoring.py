"""From generated tokens to rewards: decode, separate the thinking, grade."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from statistics import fmean
from typing import NamedTuple

from megarl.config.rewards import ScoreSettings
from megarl.data.thinking import ThinkingEnd
from megarl.data.tokenizer import Tokenizer
from megarl.environments.base import Verdict
from megarl.records import FinishReason, Prompt
from megarl.rewards.grader import GradingItem
from megarl.rewards.scorer import Part, Scoring
from megarl.train.outputs import Output


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
    found: str | None = field(default=None, compare=False)
    """What a rule of megarl's took for the answer."""
    why: str | None = field(default=None, compare=False)
    """Why it decided so, in words."""

    def count(self, name: str) -> None:
        """Add one to a counter."""
        self.counters[name] = self.counters.get(name, 0) + 1


@dataclass(frozen=True, slots=True)
class _Response:
    """What one reward is found for: the response `tokens` of output `output`."""

    output: int
    tokens: tuple[int, ...]


class _Gradable(NamedTuple):
    """A part of an output that a reward is found for, with what it may be read as one with: `thinking`, the tokens
    before it. `thought`: the thinking has come to its end still earlier."""

    tokens: tuple[int, ...]
    thinking: tuple[int, ...]
    finish_reason: FinishReason
    thought: bool = False


class Grading:
    """Finds the rewards of outputs by `scoring`. `splits_thinking`: the algorithm's outputs are one thinking and a
    response each, and their border is looked for whatever the reward sees."""

    def __init__(
        self, scoring: Scoring, tokenizer: Tokenizer, thinking_end: ThinkingEnd, *, splits_thinking: bool
    ) -> None:
        self.scoring, self._tokenizer = scoring, tokenizer
        self._thinking_end, self._splits_thinking = thinking_end, splits_thinking

    def close(self) -> None:
        """End what finds the rewards. May be called more than once."""
        self.scoring.close()

    def grade(self, prompts: Sequence[Prompt], outputs: Sequence[Output]) -> list[Graded]:
        """Rewards of outputs, one prompt each.

        Of a sum each term is found for itself, by settings of its own. A sample that an environment has given a reward,
        or failed on, is not graded, nor one that was graded when its environment was told. Raises as `_grade_part`.
        """
        asked = [place for place, output in enumerate(outputs) if not self._settled(output)]
        some, answers = [prompts[place] for place in asked], [outputs[place] for place in asked]
        found = [self._grade_part(part, some, answers) for part in self.scoring.parts if asked]
        graded = (
            (_added_up(self.scoring, ones) for ones in zip(*found, strict=True))
            if self.scoring.terms
            else chain(*found)
        )
        by_place = dict(zip(asked, graded, strict=True))
        return [
            _with_counters(by_place.get(place) or self._known(output), output) for place, output in enumerate(outputs)
        ]

    def _settled(self, output: Output) -> bool:
        """Whether there is nothing to grade in an output: its environment has failed, has said its reward, or was told
        a verdict."""
        played = output.played
        return played is not None and not (played.failure is played.reward is played.verdict is None)

    def _known(self, output: Output) -> Graded:
        """An output with the reward that its environment gave, within the run's bounds, or was told; the least where it
        failed."""
        played, (low, high) = output.played, self.scoring.bounds
        assert played is not None
        graded = Graded(self._tokenizer.decode(output.completion.token_ids), low)
        if played.failure is not None:
            return graded
        cut = played.finish_reason == "length"
        if played.reward is None:
            assert played.verdict is not None
            graded.reward, graded.terms = self._of_verdict(played.verdict, cut=cut)
        elif cut and self.scoring.of_truncated is not None:
            graded.reward = self.scoring.of_truncated
        else:
            graded.reward = min(max(played.reward, low), high)
            if graded.reward != played.reward:
                graded.count("environment_reward_bounded")
        return graded

    def _of_verdict(self, verdict: Verdict, *, cut: bool) -> tuple[float | None, dict[str, float | None]]:
        """The reward, and that of each term, of a sample whose last turn was given the verdict. Where the sample was
        `cut`, behind that turn or in it, the parts that give such a sample their least have it."""
        lowest = {part.name: part.settings.low for part in self.scoring.parts if part.settings.truncated == "zero"}
        if not (cut and lowest):
            return verdict.reward, dict(verdict.terms)
        given = [lowest.get(part.name, verdict.terms.get(part.name or "")) for part in self.scoring.parts]
        return self.scoring.total(given), dict(zip(self.scoring.terms, given, strict=False))

    def _grade_part(self, part: Part, prompts: Sequence[Prompt], outputs: Sequence[Output]) -> list[Graded]:
        """Rewards of outputs by one part of the reward.

        Where the rewards see the response alone, and where the algorithm trains by parts, an output that is not one
        thinking and a response gets the floor, `reward.low`, and is counted. The reward of several responses to a
        thinking is their mean. Raises `ScoringStopped` where the judge cannot be asked any more.
        """
        settings = part.settings
        graded = [Graded(self._tokenizer.decode(output.completion.token_ids), None) for output in outputs]
        rewards: list[list[float | None]] = [[] for _ in outputs]
        responses: list[_Response] = []
        for number, output in enumerate(outputs):
            for part_of_it in self._gradable(settings, output):
                seen = self._seen(settings, graded[number], part_of_it)
                if seen is None or (settings.truncated == "zero" and part_of_it.finish_reason == "length"):
                    rewards[number].append(settings.low)
                else:
                    responses.append(_Response(number, seen))
        texts = [self._tokenizer.decode(response.tokens) for response in responses]
        if settings.last_characters is not None:
            texts = [text[-settings.last_characters :] for text in texts]
        items = [GradingItem.of(prompts[one.output], text) for one, text in zip(responses, texts, strict=True)]
        for response, answer in zip(responses, part.scorer.grade(items), strict=True):
            rewards[response.output].append(answer.reward)
            graded[response.output].found, graded[response.output].why = answer.found, answer.why
            if answer.counter:
                graded[response.output].count(answer.counter)
        for one, found in zip(graded, rewards, strict=True):
            known = [reward for reward in found if reward is not None]
            one.reward = sum(known) / len(known) if len(known) == len(found) else None
        return graded

    def _gradable(self, settings: ScoreSettings, output: Output) -> list[_Gradable]:
        """The parts of an output that a reward is found for."""
        whole = output.completion
        if output.turns:
            return [self._last_turn(settings, output.turns, whole.finish_reason)]
        if not output.responses:
            return [_Gradable(whole.token_ids, (), whole.finish_reason)]
        thinking = whole.token_ids[: len(whole.token_ids) - len(output.responses[0].token_ids)]
        return [_Gradable(response.token_ids, thinking, response.finish_reason) for response in output.responses]

    def _last_turn(self, settings: ScoreSettings, turns: Sequence[tuple[int, ...]], reason: FinishReason) -> _Gradable:
        """The policy's last turn: what an environment put there is not its own. Its thinking may have begun in turns
        before, behind the last that ended one."""
        if settings.graded == "whole":
            return _Gradable(turns[-1], (), reason)
        thinking: tuple[int, ...] = ()
        for turn in turns[-2::-1]:
            if self._thinking_end.split(turn) != "thinking_missing":
                return _Gradable(turns[-1], thinking, reason, thought=True)
            thinking = (*turn, *thinking)
        return _Gradable(turns[-1], thinking, reason)

    def _seen(self, settings: ScoreSettings, graded: Graded, part: _Gradable) -> tuple[int, ...] | None:
        """The tokens that the reward sees of a part of an output; None where there are none to see."""
        thinking, tokens = part.thinking, part.tokens
        if settings.graded == "whole" and not self._splits_thinking:
            return tokens
        split = self._thinking_end.split((*thinking, *tokens))
        if split == "thinking_missing" and part.thought:
            return tokens
        if isinstance(split, str):
            graded.count(split)
            if thinking and split in ("thinking_repeated", "thinking_unanswered"):
                # The response's fault; the thinking itself is whole.
                graded.thinking_length = len(thinking)
            return None
        graded.thinking_length = split
        return (*thinking, *tokens)[split:] if settings.graded == "response" else tokens


def _with_counters(graded: Graded, output: Output) -> Graded:
    """What was counted while an output was made beside what was counted when it was graded."""
    if output.played is not None:
        graded.counters = dict(Counter(graded.counters) + Counter(output.played.counters))
    return graded


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
