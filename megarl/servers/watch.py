"""Whether a server as a whole is away, and waiting until it is back."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Callable, Collection

from megarl.errors import Refusal, ScoringStopped
from megarl.servers.client import AskFailed, Kind, ServerClient

#: Seconds before the second try; doubled for each further one. Our choices, as the two below.
FIRST_DELAY = 0.5
LONGEST_DELAY = 10.0
#: Least seconds that a question whether the server is there may take, however little patience is left.
LEAST_CHECK = 1.0
#: A pause that the server asks for is worth a word from here on, in seconds.
WORTH_SAYING = 5.0


def delay(tries: int, rng: random.Random) -> float:
    """Seconds to wait after `tries` + 1 failures: exponential, with jitter, so that requests do not return together."""
    return min(FIRST_DELAY * 2.0 ** min(tries, 30), LONGEST_DELAY) * rng.uniform(0.5, 1.0)


class StillAway(Exception):
    """The server gave no answer for `seconds`; `seen` is what was seen last."""

    def __init__(self, seconds: float, seen: str) -> None:
        super().__init__(seen)
        self.seconds = seconds
        self.seen = seen


class Watch:
    """What all requests of a call know of the server together. Lives in one event loop.

    `on_wait` gets a sentence whenever the run waits.
    """

    def __init__(self, client: ServerClient, rng: random.Random, on_wait: Callable[[str], None]) -> None:
        self._client = client
        self._settings = client.settings
        self._who, self._section = client.who, client.section
        self._rng = rng
        self._on_wait = on_wait
        self._not_before = -math.inf
        self._search: asyncio.Task[bool] | None = None

    def close(self) -> None:
        """Stop waiting for the server."""
        if self._search is not None:
            self._search.cancel()

    def pause(self, failure: AskFailed) -> None:
        """Let nobody ask before the server's Retry-After has passed. Raises `ScoringStopped` beyond the patience."""
        seconds = failure.retry_after
        if not seconds:
            return
        if seconds > self._settings.patience:
            raise ScoringStopped(
                f"The {self._who} at {self._settings.url} asks to wait {seconds:.0f} s, longer than "
                f"{self._section}.patience={self._settings.patience:g} (last seen: {failure.seen}). "
                f"Fix: resume the run then, or raise {self._section}.patience."
            )
        until = time.monotonic() + seconds
        if seconds >= WORTH_SAYING and until > self._not_before:
            self._on_wait(f"the {self._who} asks to wait {seconds:.0f} s ({failure.seen})")
        self._not_before = max(self._not_before, until)

    async def ready(self) -> None:
        """Wait while the server is away or has asked for a pause. Raises `ScoringStopped` where it stays away."""
        while True:
            if self._search is not None:
                await asyncio.shield(self._search)
            left = self._not_before - time.monotonic()
            if left <= 0:
                return
            await asyncio.sleep(left)

    async def was_away(self, failure: AskFailed) -> bool:
        """Whether a request failed because the server was away as a whole; it is back.

        Where nobody had a reply since then, a small question tells. Raises `ScoringStopped` where it stays away.
        """
        if self._client.replied_at > failure.sent_at:
            return False
        if self._search is None:
            self._search = asyncio.create_task(self._find_again(failure))
        return await asyncio.shield(self._search)

    async def _find_again(self, failure: AskFailed) -> bool:
        try:
            waited, _ = await self.find(failure, ("away",))
        except StillAway as away:
            raise ScoringStopped(
                f"The {self._who} at {self._settings.url} gave no answer for {away.seconds:.0f} s, past "
                f"{self._section}.patience={self._settings.patience:g} (last seen: {away.seen}). "
                f"Fix: start it again or raise {self._section}.patience, then resume the run."
            ) from None
        finally:
            self._search = None
        if waited:
            self._client.counters[f"{self._who}_outages"] += 1
            self._on_wait(f"the {self._who} answers again")
        return waited

    async def introduce(self) -> None:
        """Ask the first, small question, waiting for a server that is not there yet. Raises `Refusal`."""
        url = f"{self._section}.url={self._settings.url}"
        try:
            _, failure = await self.find(None, ("away", "busy"))
        except StillAway as away:
            rule = f"no {self._who} answers there for {away.seconds:.0f} s (last seen: {away.seen})"
            fix = f"start the {self._who}, correct the URL or raise {self._section}.patience"
            raise Refusal(url, rule, fix) from None
        if failure is not None:
            rule = f"is of no use, since the {self._who} answers the first request with {failure.seen}"
            fix = failure.fix or f"correct it or the other settings of {self._section} as the answer says"
            raise Refusal(url, rule, fix)

    async def find(self, failure: AskFailed | None, wait_on: Collection[Kind]) -> tuple[bool, AskFailed | None]:
        """Ask a small question until the server answers; failures of the kinds in `wait_on` are no answer.

        `failure` is what was seen before, if anything. Gives whether the server was waited for, and the failure that
        it answered with, if it was one. Raises `StillAway` at the end of `patience`, `ScoringStopped` where the server
        asks to wait longer than that.
        """
        settings, started_at, tries = self._settings, time.monotonic(), 0
        if failure is not None and failure.retry_after:
            self.pause(failure)
            await asyncio.sleep(failure.retry_after)
        while True:
            left = started_at + settings.patience - time.monotonic()
            try:
                await self._client.check(max(left, LEAST_CHECK))
            except AskFailed as found:
                if found.kind not in wait_on:
                    return tries > 0, found
                failure = found
            else:
                return tries > 0, None
            waited = time.monotonic() - started_at
            if waited >= settings.patience:
                raise StillAway(waited, failure.seen)
            self.pause(failure)
            self._on_wait(
                f"waiting for the {self._who} at {settings.url}, {waited:.0f} of {settings.patience:.0f} s "
                f"({failure.seen})"
            )
            pause = max(delay(tries, self._rng), failure.retry_after or 0.0)
            await asyncio.sleep(min(pause, max(settings.patience - waited, 0.0)))
            tries += 1
