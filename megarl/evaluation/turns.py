"""What one turn of a benchmark asks: the problems, or a further question after the answers to the one before."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from megarl.config.suites import Asked
from megarl.data.dataset import question_ids
from megarl.evaluation.answers import Place, Row
from megarl.records import Prompt
from megarl.rollout.engine import Request
from megarl.rollout.seeds import hash_seed
from megarl.train.evaluation import requests_of
from megarl.train.session import Session


class Turn:
    """The requests of turn `number`, from 1, and what each is about."""

    def __init__(
        self, number: int, several: bool, requests: Sequence[Request], about: Mapping[int, tuple[Prompt, int]]
    ):
        self.number, self.several, self.requests = number, several, requests
        self._about = about

    @classmethod
    def of(cls, session: Session, asked: Asked, number: int, rows: Sequence[Row]) -> Turn:
        """Turn `number` of a benchmark; `rows` are the answers to the turns before, all of them."""
        assert session.data.held_out is not None
        prompts, k = session.data.held_out.prompts, asked.config.evaluation.samples
        first = requests_of(session)
        if number == 1:
            about = {one.index: (prompts[one.index // k], one.index % k) for one in first}
            return cls(1, asked.turns > 1, first, about)
        answers = {Place.of(row): row["response"] for row in rows}
        column = asked.config.data.extra_columns[number - 2]
        requests, about = [], {}
        for one in first:
            prompt, sample = prompts[one.index // k], one.index % k
            messages = _conversation(asked, prompt, sample, number, answers)
            if messages is None or not prompt.extra.get(column):
                continue
            ids = tuple(question_ids(asked.config.data, session.tokenizer, messages))
            limit = _room(asked, len(ids))
            if limit < 1:
                continue
            assert one.seed is not None
            seed = hash_seed("turn", one.seed, number)
            requests.append(Request(ids, one.index, seed, limit))
            about[one.index] = (dataclasses.replace(prompt, token_ids=ids, text=_shown(messages)), sample)
        return cls(number, True, requests, about)

    def place(self, request: Request) -> Place:
        """What the answer to a request is called."""
        return self.place_of(request.index)

    def place_of(self, index: int) -> Place:
        prompt, sample = self._about[index]
        return Place(prompt.index, sample, self.number)

    def prompt(self, index: int) -> Prompt:
        """What a request asks; its text is what a judge is shown as the question."""
        return self._about[index][0]


def _conversation(
    asked: Asked, prompt: Prompt, sample: int, number: int, answers: Mapping[Place, str]
) -> list[dict[str, Any]] | None:
    """The turns up to question `number`; None where one before has no answer."""
    questions = [prompt.text, *(prompt.extra.get(column) for column in asked.config.data.extra_columns)]
    messages: list[dict[str, Any]] = []
    for turn in range(1, number):
        answer = answers.get(Place(prompt.index, sample, turn))
        if answer is None:
            return None
        # Some templates turn an empty answer down.
        messages += [{"role": "user", "content": questions[turn - 1]}, {"role": "assistant", "content": answer or " "}]
    return [*messages, {"role": "user", "content": str(questions[number - 1])}]


def _room(asked: Asked, prompt: int) -> int:
    """Tokens for an answer after a prompt of that many, within what the engine was made for."""
    wanted = asked.config.evaluation.max_tokens or asked.config.rollout.max_tokens
    return min(wanted, asked.config.data.max_prompt_tokens + wanted * asked.turns - prompt)


def _shown(messages: Sequence[Mapping[str, Any]]) -> str:
    """A conversation as text, with who says what."""
    names = {"user": "User", "assistant": "Assistant"}
    return "\n\n".join(f"{names[message['role']]}: {message['content']}" for message in messages)
