"""One request over the OpenAI-compatible protocol, and what can go wrong with it.

`openai` is imported on first use (half a second).
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import ssl
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, Literal, Self

from megarl.config.servers import ServerSettings
from megarl.errors import Refusal
from megarl.servers.proxies import proxy_of

#: Characters of a server's text that a message to the user quotes.
QUOTED = 200

Kind = Literal["away", "busy", "garbage", "unreadable", "rejected", "refused"]


class AskFailed(Exception):
    """A request that brought nothing of use.

    `kind` says what to do: away: nobody answered (no connection, 502 to 504, time limit); busy: try again (429, 500);
    garbage: a reply of another form; unreadable: one of the right form that does not say what was asked; rejected: the
    server will never take this request; refused: it will take none (key, model, address, money), and `fix` says what
    helps. `seen` is what was seen, `counter` what a question without an answer is counted as, `retry_after` the seconds
    that the server asks to wait, `billed` whether the request may cost money.
    """

    def __init__(
        self,
        kind: Kind,
        seen: str,
        counter: str,
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
        self.sent_at = time.monotonic()
        """When the request was sent, in seconds of the monotonic clock."""


class ServerClient(ABC):
    """Asks a server. An async context manager; lives in one event loop.

    `who` is what messages call it, and begins the names in `counters` (WHO_requests). `section` is the key of
    `settings` in the run's file.
    """

    def __init__(
        self, settings: ServerSettings, key: str | None, counters: Counter[str], section: str, who: str
    ) -> None:
        import openai

        self.settings, self.section, self.who, self.counters = settings, section, who, counters
        self.replied_at = -math.inf
        """When the server last gave a reply of the right form, in seconds of the monotonic clock."""
        self._openai = openai
        self._key = key
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

    @abstractmethod
    async def check(self, time_limit: float) -> None:
        """Ask a small question, to see whether the server is there. Raises `AskFailed`."""

    async def __aenter__(self) -> Self:
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
            url = f"{self.section}.url={self.settings.url}"
            raise Refusal(url, rule, f"correct it, or name the {self.who}'s host in no_proxy") from None

    async def _body(self, request: Callable[[], Awaitable[str]], time_limit: float | None) -> str:
        """What `request` gives within `time_limit` seconds (default: the setting). Raises `AskFailed`."""
        limit = min(self.settings.time_limit, time_limit or self.settings.time_limit)
        self.counters[f"{self.who}_requests"] += 1
        sent_at = time.monotonic()
        try:
            async with asyncio.timeout(limit):
                return await request()
        except (TimeoutError, self._openai.APITimeoutError):
            failure = AskFailed("away", f"no reply within {limit:.3g} s", f"{self.who}_timeout", billed=True)
        except self._openai.APIStatusError as error:
            failure = self._status_failure(error)
        except self._openai.APIConnectionError as error:
            failure = self._connection_failure(error)
        failure.sent_at = sent_at
        if self._proxy is not None:
            failure.seen += f", through the proxy {self._proxy}; hosts in no_proxy are asked without"
        raise failure

    def _failed(self, kind: Kind, seen: str, **more: Any) -> AskFailed:
        return AskFailed(kind, seen, f"{self.who}_error", **more)

    def _status_failure(self, error: Any) -> AskFailed:
        """What a reply with an error's status means."""
        status, code = error.status_code, getattr(error, "code", None)
        seen = f"HTTP {status}: {self._quoted(_server_message(error))}"
        if status in (502, 503, 504):
            return self._failed("away", seen, retry_after=retry_after(error.response.headers))
        fix = self._fix(status, code)
        if fix:
            return self._failed("refused", seen, fix=fix)
        if status in (408, 409, 425, 429) or status >= 500:
            return self._failed("busy", seen, retry_after=retry_after(error.response.headers))
        return self._failed("rejected", seen)

    def _fix(self, status: int, code: str | None) -> str:
        """What helps where no request can succeed, else ''."""
        settings, section = self.settings, self.section
        if status == 402 or (status == 429 and code == "insufficient_quota"):
            return f"add money to the {self.who}'s account"
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
            fix = f"correct {self.section}.url, or make its certificate known (SSL_CERT_FILE)"
            return self._failed("refused", seen, fix=fix)
        return self._failed("away", seen, billed=connected)

    def _quoted(self, text: str) -> str:
        """A server's text on one line, not too long, and without the key."""
        if self._key:
            text = text.replace(self._key, "***")
        line = " ".join(text.split())
        return line if len(line) <= QUOTED else f"{line[:QUOTED]}..."


def key_of(server: ServerSettings, section: str, who: str) -> str | None:
    """The key from the environment; None where none is sent. Raises `Refusal` where the variable holds none.

    `section` is the key of `server` in the run's file, `who` what messages call it.
    """
    if server.api_key_env is None:
        return None
    value, key = f"{section}.api_key_env={server.api_key_env}", os.environ.get(server.api_key_env, "").strip()
    if not key:
        rule = f"must name an environment variable that holds the {who}'s key, and it is not set"
        raise Refusal(value, rule, f"export {server.api_key_env}=...")
    # A header of HTTP carries no other; the key itself stands in no message.
    if not (key.isascii() and key.isprintable()):
        rule = "must hold one line of printable ASCII, as every key is, and holds other characters"
        raise Refusal(value, rule, f"put the key alone into {server.api_key_env}")
    return key


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
