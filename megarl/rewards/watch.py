"""Whether the judge as a whole is away, and waiting until it is back."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Collection

from megarl.config.rewards import JudgeSettings
from megarl.errors import ScoringStopped
from megarl.rewards.answers import GradingItem
from megarl.rewards.chat import AskFailed, ChatClient, Kind
from megarl.rewards.verdict import TEMPLATE, message_of

#: Seconds before the second try; doubled for each further one. Our choices, as the two below.
FIRST_DELAY = 0.5
LONGEST_DELAY = 10.0
#: Least seconds that a question whether the judge is there may take, however little patience is left.
LEAST_CHECK = 1.0
#: A pause that the judge asks for is worth a word from here on, in seconds.
WORTH_SAYING = 5.0


def delay(tries: int, rng: random.Random) -> float:
    """Seconds to wait after `tries` + 1 failures: exponential, with jitter, so that requests do not return together."""
    return min(FIRST_DELAY * 2.0 ** min(tries, 30), LONGEST_DELAY) * rng.uniform(0.5, 1.0)


def check_message(settings: JudgeSettings) -> str:
    """A small message of the form that answers are asked about in."""
    item = GradingItem(text="4", answer="4", question="What is 2 + 2?")
    return message_of(settings.template or TEMPLATE, item)


class StillAway(Exception):
    """The judge gave no answer for `seconds`; `seen` is what was seen last."""

    def __init__(self, seconds: float, seen: str) -> None:
        super().__init__(seen)
        self.seconds = seconds
        self.seen = seen


class Watch:
    """What all requests of a call know of the judge together. Lives in one event loop.

    `section` is the key of `settings` in the run's file.
    """

    def __init__(
        self,
        client: ChatClient,
        settings: JudgeSettings,
        counters: Counter[str],
        rng: random.Random,
        on_wait: Callable[[str], None],
        section: str,
    ) -> None:
        self._client = client
        self._settings = settings
        self._counters = counters
        self._rng = rng
        self._on_wait = on_wait
        self._section = section
        self._last_reply = -math.inf
        self._not_before = -math.inf
        self._search: asyncio.Task[bool] | None = None

    def close(self) -> None:
        """Stop waiting for the judge."""
        if self._search is not None:
            self._search.cancel()

    def replied(self) -> None:
        """Note that the judge has just replied."""
        self._last_reply = time.monotonic()

    def pause(self, failure: AskFailed) -> None:
        """Let nobody ask before the judge's Retry-After has passed. Raises `ScoringStopped` beyond the patience."""
        seconds = failure.retry_after
        if not seconds:
            return
        if seconds > self._settings.patience:
            raise ScoringStopped(
                f"The judge at {self._settings.url} asks to wait {seconds:.0f} s, longer than "
                f"{self._section}.patience={self._settings.patience:g} (last seen: {failure.seen}). "
                f"Fix: resume the run then, or raise {self._section}.patience."
            )
        until = time.monotonic() + seconds
        if seconds >= WORTH_SAYING and until > self._not_before:
            self._on_wait(f"the judge asks to wait {seconds:.0f} s ({failure.seen})")
        self._not_before = max(self._not_before, until)

    async def ready(self) -> None:
        """Wait while the judge is away or has asked for a pause. Raises `ScoringStopped` where it stays away."""
        while True:
            if self._search is not None:
                await asyncio.shield(self._search)
            left = self._not_before - time.monotonic()
            if left <= 0:
                return
            await asyncio.sleep(left)

    async def was_away(self, sent_at: float, failure: AskFailed) -> bool:
        """Whether a request, sent at `sent_at` and failed, failed because the judge was away as a whole; it is back.

        Where nobody had a reply since then, a small question tells. Raises `ScoringStopped` where it stays away.
        """
        if self._last_reply > sent_at:
            return False
        if self._search is None:
            self._search = asyncio.create_task(self._find_again(failure))
        return await asyncio.shield(self._search)

    async def _find_again(self, failure: AskFailed) -> bool:
        try:
            waited, _ = await self.find(failure, ("away",))
        except StillAway as away:
            raise ScoringStopped(
                f"The judge at {self._settings.url} gave no answer for {away.seconds:.0f} s, past "
                f"{self._section}.patience={self._settings.patience:g} (last seen: {away.seen}). "
                f"Fix: start it again or raise {self._section}.patience, then resume the run."
            ) from None
        finally:
            self._search = None
        if waited:
            self._counters["judge_outages"] += 1
            self._on_wait("the judge answers again")
        return waited

    async def find(self, failure: AskFailed | None, wait_on: Collection[Kind]) -> tuple[bool, AskFailed | None]:
        """Ask a small question until the judge answers; failures of the kinds in `wait_on` are no answer.

        `failure` is what was seen before, if anything. Gives whether the judge was waited for, and the failure that it
        answered with, if it was one. Raises `StillAway` at the end of `patience`, `ScoringStopped` where the judge asks
        to wait longer than that.
        """
        settings, started_at, tries = self._settings, time.monotonic(), 0
        if failure is not None and failure.retry_after:
            self.pause(failure)
            await asyncio.sleep(failure.retry_after)
        while True:
            left = started_at + settings.patience - time.monotonic()
            try:
                await self._client.ask(check_message(settings), max(left, LEAST_CHECK))
            except AskFailed as found:
                if found.kind not in wait_on:
                    return tries > 0, found
                failure = found
            else:
                self.replied()
                return tries > 0, None
            waited = time.monotonic() - started_at
            if waited >= settings.patience:
                raise StillAway(waited, failure.seen)
            self.pause(failure)
            self._on_wait(
                f"waiting for the judge at {settings.url}, {waited:.0f} of {settings.patience:.0f} s ({failure.seen})"
            )
            pause = max(delay(tries, self._rng), failure.retry_after or 0.0)
            await asyncio.sleep(min(pause, max(settings.patience - waited, 0.0)))
            tries += 1
