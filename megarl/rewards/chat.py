"""One question to the judge over the chat-completions protocol, and what it costs."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from megarl.config.rewards import JudgeSettings
from megarl.rewards.answers import GradingItem
from megarl.rewards.spending import Spending
from megarl.rewards.verdict import TEMPLATE, message_of
from megarl.servers.client import AskFailed, ServerClient

#: Bytes of text per token where the server does not count: English has about four. Our choice, on the dear side.
BYTES_PER_TOKEN = 3
#: Tokens that a server's chat template may put around the messages. Our choice.
TEMPLATE_TOKENS = 64


@dataclass(frozen=True, slots=True)
class JudgeReply:
    """The judge's words. `whole` is False where the server cut them at the token limit."""

    text: str
    whole: bool


class ChatClient(ServerClient):
    """Asks the judge.

    Counts into `counters` (judge_requests, judge_input_tokens, judge_output_tokens, judge_estimated_replies) and
    charges `spending`.
    """

    def __init__(
        self, settings: JudgeSettings, key: str | None, counters: Counter[str], spending: Spending, section: str
    ) -> None:
        super().__init__(settings, key, counters, section, "judge")
        self._judge = settings
        self._spending = spending

    async def check(self, time_limit: float) -> None:
        """Ask a small question of the form that answers are asked about in."""
        await self.ask(check_message(self._judge), time_limit)

    async def ask(self, text: str, time_limit: float | None = None) -> JudgeReply:
        """The judge's reply to the message `text`, within `time_limit` seconds (default: the setting).

        Raises `AskFailed`.
        """
        try:
            body = await self._body(lambda: self._post(text), time_limit)
        except AskFailed as failure:
            if failure.billed:
                self._spending.charge(most_it_costs(self._judge, text))
            raise
        return self._read(text, body)

    async def _post(self, text: str) -> str:
        """Send the request; the body of the reply."""
        settings = self._judge
        # A lone surrogate, which a data file may hold, cannot be sent.
        messages: list[Any] = [{"role": "user", "content": text.encode(errors="replace").decode()}]
        if settings.system is not None:
            messages.insert(0, {"role": "system", "content": settings.system})
        options: dict[str, Any] = {settings.max_tokens_name: settings.max_tokens}
        if settings.temperature is not None:
            options["temperature"] = settings.temperature
        response = await self._client.chat.completions.with_raw_response.create(
            model=settings.model, messages=messages, extra_headers=self._headers, extra_body=settings.extra, **options
        )
        return response.text

    def _read(self, text: str, body: str) -> JudgeReply:
        """The reply in the body of an answer with status 200; its cost is noted. Raises `AskFailed` for garbage."""
        try:
            reply = json.loads(body)
            choice = reply["choices"][0]
            content = choice["message"].get("content")
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            self._spending.charge(most_it_costs(self._judge, text))
            seen = f"a reply that is no chat completion: {self._quoted(body)}"
            raise self._failed("garbage", seen) from None
        self.replied_at = time.monotonic()
        # A refusal, a call of a tool, or reasoning up to the limit leaves the content empty.
        words = content if isinstance(content, str) else ""
        self._note_tokens(text, words, reply.get("usage"))
        return JudgeReply(words, choice.get("finish_reason") != "length")

    def _note_tokens(self, text: str, words: str, usage: Any) -> None:
        """Count and charge the tokens of a reply: by its `usage`, else estimated from the lengths of the texts."""
        usage = usage if isinstance(usage, dict) else {}
        sent, received = usage.get("prompt_tokens"), usage.get("completion_tokens")
        if not (isinstance(sent, int) and isinstance(received, int) and sent >= 0 and received >= 0):
            self.counters["judge_estimated_replies"] += 1
            sent = TEMPLATE_TOKENS + -(-_bytes(self._judge, text) // BYTES_PER_TOKEN)
            received = -(-len(words.encode(errors="replace")) // BYTES_PER_TOKEN)
        self.counters["judge_input_tokens"] += sent
        self.counters["judge_output_tokens"] += received
        self._spending.charge(_cost(self._judge, sent, received))


def check_message(settings: JudgeSettings) -> str:
    """A small message of the form that answers are asked about in."""
    item = GradingItem(text="4", answer="4", question="What is 2 + 2?")
    return message_of(settings.template or TEMPLATE, item)


def most_it_costs(settings: JudgeSettings, text: str) -> float:
    """The most that asking the message `text` can cost: no token is shorter than a byte."""
    return _cost(settings, TEMPLATE_TOKENS + _bytes(settings, text), settings.max_tokens)


def _cost(settings: JudgeSettings, sent: int, received: int) -> float:
    return (sent * settings.input_price + received * settings.output_price) / 1e6


def _bytes(settings: JudgeSettings, text: str) -> int:
    return len(text.encode(errors="replace")) + len((settings.system or "").encode())
