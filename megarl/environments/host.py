"""Environments in the terms of the engine: token ids in, token ids out.

What the policy wrote is decoded for its environment, and never tokenised again; what the environment says is tokenised
once.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from megarl.config.environments import EnvironmentSettings
from megarl.data.continuation import continuation_ids
from megarl.data.tokenizer import Tokenizer
from megarl.environments.base import BAD_REPLY, Heard
from megarl.environments.workers import Answered, Environments
from megarl.errors import Refusal
from megarl.records import FinishReason, Prompt

#: Seconds between two looks for verdicts, where nothing else is waited for.
_GLANCE = 0.02


class Said(NamedTuple):
    """A turn of the policy's, to be graded as an answer to `prompt`."""

    prompt: Prompt
    token_ids: tuple[int, ...]
    finish_reason: FinishReason


#: Rewards of turns as answers, None where none can be found. Raises `ScoringStopped`.
Grade = Callable[[Sequence[Said]], Sequence[float | None]]


class Host:
    """A replica's environments, on its first rank: `start`, `turn` and `end` return at once, `poll` hears.

    `grade` finds the verdicts of environments that want them.
    """

    def __init__(self, environments: Environments, tokenizer: Tokenizer, grade: Grade | None = None) -> None:
        self._environments, self._tokenizer = environments, tokenizer
        self._prompts: dict[int, Prompt] = {}
        self._last: dict[int, int] = {}
        """The last token of each sample's turn, by samples that have begun."""
        texts = {text: tokenizer.encode(text) for text in environments.traits.stops}
        self._stops = {ids[0]: text for text, ids in texts.items() if len(ids) == 1}
        self._verdicts = _Verdicts(grade) if grade is not None and environments.traits.verdict else None

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
        self._last[index] = token_ids[-1]
        if self._verdicts is not None:
            self._verdicts.ask(index, Said(self._prompts[index], token_ids, reason))
        else:
            self._environments.turn(index, self._read(token_ids))

    def end(self, index: int) -> None:
        """Sample `index` has come to its end."""
        self._environments.end(index)
        self._prompts.pop(index, None)
        self._last.pop(index, None)

    def poll(self, timeout: float = 0.0) -> list[Heard]:
        """What has been heard; where nothing was, what is within `timeout` seconds or a little less.

        Raises `ScoringStopped` where verdicts cannot be found any more, or environments not be started.
        """
        if self._verdicts is not None:
            found = self._verdicts.poll()
            for index, said, verdict in found:
                if index in self._prompts:
                    self._environments.turn(index, self._read(said.token_ids), verdict)
            timeout = min(timeout, _GLANCE) if self._verdicts.pending or found else timeout
        return [self._in_tokens(answered) for answered in self._environments.poll(timeout)]

    def take_first_failure(self) -> str | None:
        """A sentence about the first failure since it was last asked for, if there was one."""
        return self._environments.take_first_failure()

    def close(self) -> None:
        """End all processes. May be called more than once."""
        self._environments.close()

    def _read(self, token_ids: tuple[int, ...]) -> str | tuple[int, ...]:
        if self._environments.traits.tokens:
            return token_ids
        if token_ids[-1] in self._stops:  # it may be a control token, which gives no text
            return self._tokenizer.decode(token_ids[:-1]) + self._stops[token_ids[-1]]
        return self._tokenizer.decode(token_ids)

    def _in_tokens(self, answered: Answered) -> Heard:
        index = answered.sample
        if answered.failure is not None:
            return Heard(index, failure=answered.failure)
        begins = index not in self._last
        given: Any = {"observation": answered.given, "reward": None, "counters": ()} if begins else answered.given
        try:
            ids = None if given["observation"] is None else self._ids(index, given["observation"], begins)
        except (Refusal, _NoTokens) as error:
            self._environments.note_failure(f"gave what cannot be put into tokens: {error}")
            return Heard(index, failure=BAD_REPLY)
        return Heard(index, ids, given["reward"], tuple(given["counters"]))

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
        return tuple(continuation_ids(self._tokenizer, said, self._last[index]))


def build(
    settings: EnvironmentSettings, tokenizer: Tokenizer, trial: Prompt | None = None, grade: Grade | None = None
) -> Host:
    """The host of `settings.kind`. Raises as `Environments`, whose `trial` it is."""
    return Host(Environments(settings, trial), tokenizer, grade)


class _NoTokens(Exception):
    """Something has no tokens; the message says why."""


def _messages(said: str | list[Any]) -> list[dict[str, str]]:
    return [{"role": "user", "content": said}] if isinstance(said, str) else said


class _Verdicts:
    """Grades turns in a thread, as many at a time as have come by then: the engine goes on meanwhile."""

    def __init__(self, grade: Grade) -> None:
        self._grade = grade
        self._asked: queue.SimpleQueue[tuple[int, Said]] = queue.SimpleQueue()
        self._found: queue.SimpleQueue[tuple[int, Said, float | None] | Exception] = queue.SimpleQueue()
        self.pending = 0
        threading.Thread(target=self._work, name="verdicts", daemon=True).start()

    def ask(self, index: int, said: Said) -> None:
        """Find the verdict of a turn of sample `index`."""
        self.pending += 1
        self._asked.put((index, said))

    def poll(self) -> list[tuple[int, Said, float | None]]:
        """Verdicts that were found. Raises what finding them raised."""
        found = []
        while not self._found.empty():
            one = self._found.get()
            self.pending -= 1
            if isinstance(one, Exception):
                self.pending = 0
                raise one
            found.append(one)
        return found

    def _work(self) -> None:
        while True:
            asked = [self._asked.get()]
            while not self._asked.empty():
                asked.append(self._asked.get())
            try:
                verdicts = self._grade([said for _, said in asked])
                for (index, said), verdict in zip(asked, verdicts, strict=True):
                    self._found.put((index, said, verdict))
            except Exception as error:
                self._found.put(error)
