"""Many questions to a server: as many at a time as it is allowed, each asked until it is answered or given up."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Generic, TypeVar

from megarl.errors import Interrupted, ScoringStopped
from megarl.parallel import progress
from megarl.servers.client import AskFailed, ServerClient
from megarl.servers.failures import Failures
from megarl.servers.watch import Watch, delay

#: Failures of a question because the server was away as a whole that do not count as its tries. More, and the question
#: may be what ends the server. Our choice.
SPARED_TRIES = 3
#: Seconds between two looks whether to stop. Our choice.
LOOK_EVERY = 0.5

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class AskingGivenUp(Interrupted):
    """The run has to stop, and what was asked last is not waited for."""


class Asking(Generic[Item, Answer]):
    """One call of many questions.

    `ask(item, failure)` asks about one item, `failure` being what came of it before, and gives its answer or raises
    `AskFailed`. What is given up is counted in `failures`.
    """

    def __init__(
        self,
        client: ServerClient,
        watch: Watch,
        failures: Failures,
        rng: random.Random,
        ask: Callable[[Item, AskFailed | None], Awaitable[Answer]],
    ) -> None:
        self._client, self._watch, self._failures, self._rng, self._ask = client, watch, failures, rng, ask
        self._settings = client.settings
        self._started_at = time.monotonic()

    async def answers(
        self, items: Sequence[Item], stop: Callable[[], bool] = lambda: False
    ) -> list[Answer | AskFailed]:
        """The items' answers in order, `AskFailed` where one was given up.

        Raises `ScoringStopped` where the server stays away, takes no request any more, or fails on too many items;
        `AskingGivenUp` soon after `stop` says so.
        """
        found: dict[int, Answer | AskFailed] = {}
        work = iter(enumerate(items))
        self._failures.begin(len(items))
        workers = [self._work(work, found) for _ in range(min(self._settings.concurrency, len(items)))]
        tasks = [asyncio.create_task(one) for one in workers]
        look, together = asyncio.create_task(_until(stop)), asyncio.gather(*tasks)
        try:
            await asyncio.wait([look, together], return_when=asyncio.FIRST_COMPLETED)
            if not together.done():
                raise AskingGivenUp(f"the {self._client.who} was not waited for")
            await together
        finally:
            for task in (look, *tasks):
                task.cancel()
            await asyncio.gather(look, together, *tasks, return_exceptions=True)
        self._failures.end()
        return [found[index] for index in range(len(items))]

    async def _work(self, work: Iterator[tuple[int, Item]], found: dict[int, Answer | AskFailed]) -> None:
        """Take the next item and ask about it, until none is left."""
        for index, item in work:
            found[index] = await self._asked(item)
            progress.tick()

    async def _asked(self, item: Item) -> Answer | AskFailed:
        tries, spared, failure = 0, SPARED_TRIES, None
        while True:
            await self._watch.ready()
            try:
                return await self._ask(item, failure)
            except AskFailed as failed:
                failure = failed
            if failure.kind == "refused":
                raise ScoringStopped(
                    f"The {self._client.who} at {self._settings.url} takes no request any more, "
                    f"{time.monotonic() - self._started_at:.0f} s into a call (last seen: {failure.seen}). "
                    f"Fix: {failure.fix}, then resume the run."
                )
            if failure.kind == "away" and await self._watch.was_away(failure) and spared:
                spared -= 1
                continue
            if failure.kind == "rejected" or tries == self._settings.retries:
                self._failures.note(failure.counter, failure.seen)
                return failure
            self._client.counters[f"{self._client.who}_retries"] += 1
            if failure.kind != "unreadable":
                self._watch.pause(failure)
                await asyncio.sleep(delay(tries, self._rng))
            tries += 1


async def _until(stop: Callable[[], bool]) -> None:
    while not stop():
        await asyncio.sleep(LOOK_EVERY)
