"""Environments in the terms of the engine: token ids in, token ids out.

What the policy wrote is decoded for its environment, and never tokenised again; what the environment says is tokenised
once.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from megarl.config.environments import EnvironmentSettings
from megarl.data.continuation import continuation_ids
from megarl.data.tokenizer import Tokenizer
from megarl.environments.base import BAD_REPLY, Heard, Verdict
from megarl.environments.verdicts import Grade, Said, Verdicts
from megarl.environments.workers import Answered, Environments
from megarl.errors import Refusal
from megarl.records import FinishReason, Prompt


class Host:
    """A replica's environments, on its first rank: `start`, `turn` and `end` return at once, `poll` hears.

    `grade` finds the verdicts of environments that want them.
    """

    def __init__(self, environments: Environments, tokenizer: Tokenizer, grade: Grade | None = None) -> None:
        self._environments, self._tokenizer = environments, tokenizer
        self._prompts: dict[int, Prompt] = {}
        self._turns: dict[int, tuple[tuple[int, ...], ...]] = {}
        """The policy's turns, by samples that have one."""
        self._told: dict[int, Verdict] = {}
        """The verdicts that environments were last told, by sample."""
        texts = {text: tokenizer.encode(text) for text in environments.traits.stops}
        self._stops = {ids[0]: text for text, ids in texts.items() if len(ids) == 1}
        self._verdicts = Verdicts(grade) if grade is not None and environments.traits.verdict else None

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a turn, since the environment reads what ends with them."""
        return tuple(self._stops)

    def start(self, index: int, prompt: Prompt, seed: int) -> None:
        """Begin with sample `index`, whose environment draws by `seed`."""
        self._prompts[index] = prompt
        self._environments.start(index, prompt, seed)

    def turn(self, index: int, token_ids: tuple[int, ...], reason: FinishReason) -> None:
        """Tell the environment what the policy wrote in a turn, with its verdict where it wants one."""
        self._turns[index] = (*self._turns.get(index, ()), token_ids)
        if self._verdicts is not None:
            self._verdicts.ask(index, Said(self._prompts[index], self._turns[index], reason))
        else:
            self._environments.turn(index, self._read(token_ids))

    def end(self, index: int) -> None:
        """Sample `index` has come to its end."""
        self._environments.end(index)
        for of_samples in (self._prompts, self._turns, self._told):
            of_samples.pop(index, None)

    def poll(self, timeout: float = 0.0) -> list[Heard]:
        """What has been heard; where nothing was, what is within `timeout` seconds.

        Raises `ScoringStopped` where verdicts cannot be found any more, or environments not be started.
        """
        until = time.monotonic() + timeout
        while True:
            for index, said, verdict in self._verdicts.poll() if self._verdicts is not None else ():
                if index in self._prompts:
                    self._told[index] = verdict
                    self._environments.turn(index, self._read(said.turns[-1]), verdict.reward)
            bell = None if self._verdicts is None else self._verdicts.bell
            left = max(0.0, until - time.monotonic())
            heard = [self._in_tokens(answered) for answered in self._environments.poll(left, bell)]
            if heard or bell is None or left == 0:
                return heard

    def take_first_failure(self) -> str | None:
        """A sentence about the first failure since it was last asked for, if there was one."""
        return self._environments.take_first_failure()

    def close(self) -> None:
        """End all processes. May be called more than once."""
        if self._verdicts is not None:
            self._verdicts.close()
        self._environments.close()

    def _read(self, token_ids: tuple[int, ...]) -> str | tuple[int, ...]:
        if self._environments.traits.tokens:
            return token_ids
        if token_ids[-1] in self._stops:  # it may be a control token, which gives no text
            return self._tokenizer.decode(token_ids[:-1]) + self._stops[token_ids[-1]]
        return self._tokenizer.decode(token_ids)

    def _in_tokens(self, answered: Answered) -> Heard:
        index = answered.sample
        begins, verdict = index not in self._turns, self._told.pop(index, None)
        counters = {} if verdict is None else verdict.counters
        if answered.failure is not None:
            return Heard(index, counters=counters, failure=answered.failure)
        given: Any = {"observation": answered.given, "reward": None, "counters": ()} if begins else answered.given
        try:
            ids = None if given["observation"] is None else self._ids(index, given["observation"], begins)
        except (Refusal, _NoTokens) as error:
            self._environments.note_failure(f"gave what cannot be put into tokens: {error}")
            return Heard(index, counters=counters, failure=BAD_REPLY)
        counters = dict(Counter(given["counters"]) + Counter(counters))
        return Heard(index, ids, given["reward"], counters, verdict=verdict)

    def _ids(self, index: int, said: str | list[Any], begins: bool) -> tuple[int, ...]:
        if isinstance(said, list) and isinstance(said[0], int):
            beyond = [one for one in said if one >= self._tokenizer.vocab_size]
            if beyond:
                raise _NoTokens(f"{beyond[0]} is no token of the tokenizer's {self._tokenizer.vocab_size}")
            return tuple(said)
        if begins:
            return tuple(self._tokenizer.apply_chat(_messages(said)))
        if isinstance(said, str):
            return tuple(self._tokenizer.encode(said))
        return tuple(continuation_ids(self._tokenizer, said, self._turns[index][-1][-1]))


def build(
    settings: EnvironmentSettings, tokenizer: Tokenizer, trial: Prompt | None = None, grade: Grade | None = None
) -> Host:
    """The host of `settings.kind`. Raises as `Environments`, whose `trial` it is."""
    return Host(Environments(settings, trial), tokenizer, grade)


class _NoTokens(Exception):
    """Something has no tokens; the message says why."""


def _messages(said: str | list[Any]) -> list[dict[str, str]]:
    return [{"role": "user", "content": said}] if isinstance(said, str) else said
