"""One question to the judge over the OpenAI-compatible chat-completions protocol, and what can go wrong with it.

`openai` is imported on first use (half a second).
"""

from __future__ import annotations

import asyncio
import json
import os
import ssl
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, Literal

from megarl.config.rewards import JudgeSettings
from megarl.errors import Refusal
from megarl.rewards.proxies import proxy_of
from megarl.rewards.spending import Spending

#: Bytes of text per token where the server does not count: English has about four. Our choice, on the dear side.
BYTES_PER_TOKEN = 3
#: Tokens that a server's chat template may put around the messages. Our choice.
TEMPLATE_TOKENS = 64
#: Characters of a server's text that a message to the user quotes.
QUOTED = 200

Kind = Literal["away", "busy", "garbage", "unreadable", "rejected", "refused"]


class AskFailed(Exception):
    """A request that brought no verdict.

    `kind` says what to do: away: nobody answered (no connection, 502 to 504, time limit); busy: try again (429, 500);
    garbage: a reply that is no completion; unreadable: a completion without a clear score; rejected: the server will
    never take this request; refused: it will take none (key, model, address, money), and `fix` says what helps.
    `seen` is what was seen, `counter` what an answer without a reward is counted as, `retry_after` the seconds that the
    server asks to wait, `billed` whether the request may cost money.
    """

    def __init__(
        self,
        kind: Kind,
        seen: str,
        counter: str = "judge_error",
        *,
        fix: str = "",
        retry_after: float | None = None,
        billed: bool = False,
    ) -> None:
        super().__init__(seen)
        self.kind: Kind = kind
        self.seen = seen
        self.counter = counter
        self.fix = fix
        self.retry_after = retry_after
        self.billed = billed


@dataclass(frozen=True, slots=True)
class Reply:
    """The judge's words. `whole` is False where the server cut them at the token limit."""

    text: str
    whole: bool


class ChatClient:
    """Asks the judge. An async context manager; lives in one event loop.

    Counts into `counters` (judge_requests, judge_input_tokens, judge_output_tokens, judge_estimated_replies) and
    charges `spending`. `section` is the key of `settings` in the run's file.
    """

    def __init__(
        self, settings: JudgeSettings, key: str | None, counters: Counter[str], spending: Spending, section: str
    ) -> None:
        import openai

        self._openai = openai
        self._settings = settings
        self._key = key
        self._counters = counters
        self._spending = spending
        self._section = section
        self._proxy = proxy_of(settings.url)
        # Retries are the caller's: it knows what the other requests saw, and counts.
        self._client = openai.AsyncOpenAI(
            base_url=settings.url,
            api_key=key or "none",
            max_retries=0,
            timeout=settings.time_limit,
            http_client=self._http_client(),
        )
        # Without these the library would send what it finds in the environment, meant for another server.
        self._headers: dict[str, Any] = {name: openai.Omit() for name in ("OpenAI-Organization", "OpenAI-Project")}
        if key is None:
            self._headers["Authorization"] = openai.Omit()

    async def __aenter__(self) -> ChatClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.close()

    def _http_client(self) -> Any:
        """The HTTP client below. Raises `Refusal` for a proxy of the environment that it cannot use."""
        if self._proxy is None:
            # The environment is not asked at all: the library would look at each of its proxies. Of the rest it holds,
            # these name certificates.
            own = any(os.environ.get(name) for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"))
            verify = ssl.create_default_context() if own else True
            return self._openai.DefaultAsyncHttpxClient(trust_env=False, verify=verify)
        try:
            return self._openai.DefaultAsyncHttpxClient()
        except Exception as error:  # such as for an address of a kind that it does not know
            rule = f"is asked through the proxy {self._proxy}, which cannot be used ({self._quoted(str(error))})"
            url = f"{self._section}.url={self._settings.url}"
            raise Refusal(url, rule, "correct it, or name the judge's host in no_proxy") from None

    async def ask(self, text: str, time_limit: float | None = None) -> Reply:
        """The judge's reply to the message `text`, within `time_limit` seconds (default: the setting).

        Raises `AskFailed`.
        """
        limit = min(self._settings.time_limit, time_limit or self._settings.time_limit)
        self._counters["judge_requests"] += 1
        try:
            async with asyncio.timeout(limit):
                body = await self._post(text)
        except TimeoutError:
            failure = AskFailed("away", f"no reply within {limit:.3g} s", "judge_timeout", billed=True)
        except self._openai.APIStatusError as error:
            failure = self._status_failure(error)
        except self._openai.APITimeoutError:
            failure = AskFailed("away", f"no reply within {limit:.3g} s", "judge_timeout", billed=True)
        except self._openai.APIConnectionError as error:
            failure = self._connection_failure(error)
        else:
            return self._read(text, body)
        if failure.billed:
            self._spending.charge(most_it_costs(self._settings, text))
        if self._proxy is not None:
            failure.seen += f", through the proxy {self._proxy}; hosts in no_proxy are asked without"
        raise failure

    async def _post(self, text: str) -> str:
        """Send the request; the body of the reply."""
        settings = self._settings
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

    def _read(self, text: str, body: str) -> Reply:
        """The reply in the body of an answer with status 200; its cost is noted. Raises `AskFailed` for garbage."""
        try:
            reply = json.loads(body)
            choice = reply["choices"][0]
            content = choice["message"].get("content")
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            self._spending.charge(most_it_costs(self._settings, text))
            seen = f"a reply that is no chat completion: {self._quoted(body)}"
            raise AskFailed("garbage", seen, billed=True) from None
        # A refusal, a call of a tool, or reasoning up to the limit leaves the content empty.
        words = content if isinstance(content, str) else ""
        self._note_tokens(text, words, reply.get("usage"))
        return Reply(words, choice.get("finish_reason") != "length")

    def _note_tokens(self, text: str, words: str, usage: Any) -> None:
        """Count and charge the tokens of a reply: by its `usage`, else estimated from the lengths of the texts."""
        usage = usage if isinstance(usage, dict) else {}
        sent, received = usage.get("prompt_tokens"), usage.get("completion_tokens")
        if not (isinstance(sent, int) and isinstance(received, int) and sent >= 0 and received >= 0):
            self._counters["judge_estimated_replies"] += 1
            sent = TEMPLATE_TOKENS + -(-_bytes(self._settings, text) // BYTES_PER_TOKEN)
            received = -(-len(words.encode(errors="replace")) // BYTES_PER_TOKEN)
        self._counters["judge_input_tokens"] += sent
        self._counters["judge_output_tokens"] += received
        self._spending.charge(_cost(self._settings, sent, received))

    def _status_failure(self, error: Any) -> AskFailed:
        """What a reply with an error's status means."""
        status, code = error.status_code, getattr(error, "code", None)
        seen = f"HTTP {status}: {self._quoted(_server_message(error))}"
        if status in (502, 503, 504):
            return AskFailed("away", seen, retry_after=retry_after(error.response.headers))
        fix = self._fix(status, code)
        if fix:
            return AskFailed("refused", seen, fix=fix)
        if status in (408, 409, 425, 429) or status >= 500:
            return AskFailed("busy", seen, retry_after=retry_after(error.response.headers))
        return AskFailed("rejected", seen)

    def _fix(self, status: int, code: str | None) -> str:
        """What helps where no request can succeed, else ''."""
        settings, section = self._settings, self._section
        if status == 402 or (status == 429 and code == "insufficient_quota"):
            return "add money to the judge's account"
        if status == 401 and self._key is None:
            return f"set {section}.api_key_env to the environment variable that holds the key"
        if status == 401:
            return f"put a valid key into the environment variable {settings.api_key_env}"
        if status == 403:
            return f"use a key that may use {section}.model={settings.model}"
        if status == 404:
            return f"correct {section}.model={settings.model}, or {section}.url, which often ends in /v1"
        return ""

    def _connection_failure(self, error: BaseException) -> AskFailed:
        """What a connection that failed, or ended before the reply, means."""
        chain = [error]
        while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
            chain.append(cause)
        # Told by name: which HTTP library lies below is the client's affair.
        connected = not any(type(link).__name__ in ("ConnectError", "ConnectTimeout") for link in chain)
        seen = self._quoted(str(chain[-1])) or type(chain[-1]).__name__
        cut_off = (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError)
        if any(isinstance(link, ssl.SSLError) and not isinstance(link, cut_off) for link in chain):
            fix = f"correct {self._section}.url, or make its certificate known (SSL_CERT_FILE)"
            return AskFailed("refused", seen, fix=fix)
        return AskFailed("away", seen, billed=connected)

    def _quoted(self, text: str) -> str:
        """A server's text on one line, not too long, and without the key."""
        if self._key:
            text = text.replace(self._key, "***")
        line = " ".join(text.split())
        return line if len(line) <= QUOTED else f"{line[:QUOTED]}..."


def most_it_costs(settings: JudgeSettings, text: str) -> float:
    """The most that asking the message `text` can cost: no token is shorter than a byte."""
    return _cost(settings, TEMPLATE_TOKENS + _bytes(settings, text), settings.max_tokens)


def _cost(settings: JudgeSettings, sent: int, received: int) -> float:
    return (sent * settings.input_price + received * settings.output_price) / 1e6


def _bytes(settings: JudgeSettings, text: str) -> int:
    return len(text.encode(errors="replace")) + len((settings.system or "").encode())


def _server_message(error: Any) -> str:
    """The `error.message` of a server's reply where it has one, else the whole body."""
    body = error.body
    if isinstance(body, Mapping):
        message = body.get("message")
        return message if isinstance(message, str) else json.dumps(body)
    return str(body or error.response.reason_phrase)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the header Retry-After asks to wait; None without it, or where it is no time. Never negative."""
    value = headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return None
    return max(0.0, seconds) if seconds == seconds else None
