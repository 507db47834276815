"""Rewards by a language model that scores answers, asked over HTTP.

A verdict that failed or cannot be read is never a low reward: the answer is asked about again, and after that stays
without reward. Where the judge is away as a whole the run waits; where it can no longer be used the run stops.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from megarl.config.rewards import JudgeSettings, ScoreSettings
from megarl.errors import MegarlError, Refusal, ScoringStopped
from megarl.parallel import progress
from megarl.rewards.answers import GradedAnswer, GradingItem, scaled
from megarl.rewards.chat import AskFailed, ChatClient, most_it_costs
from megarl.rewards.failures import Failures
from megarl.rewards.spending import Spending
from megarl.rewards.verdict import HIGHEST, LOWEST, REMINDER, TEMPLATE, message_of, read_score
from megarl.rewards.watch import StillAway, Watch, check_message, delay

#: Failures of an answer because the judge was away as a whole that do not count as its tries. More, and the answer may
#: be what ends the judge. Our choice.
SPARED_TRIES = 3


def _fixes(section: str) -> dict[str, str]:
    """What helps where too many answers fail, by what most of them failed of."""
    return {
        "judge_unreadable": f"use a judge that writes the line `Score: N`, ask for it in {section}.template, or raise "
        f"{section}.max_tokens",
        "judge_timeout": f"raise {section}.time_limit or lower {section}.concurrency",
        "judge_error": f"see the judge's own log, or lower {section}.concurrency",
    }


class Judge:
    """Scores answers with the language model of `settings.judge`; a score of 1 to 10 becomes low to high, linearly.

    Asks the judge a small question at construction. Raises `Refusal` where the settings cannot work, where the judge
    turns the question down (address, key, model, a setting), and where it is not there within `patience` seconds;
    `ScoringStopped` where it asks to wait longer than that.

    `replicas` judges share `max_cost_per_step` evenly. `on_wait` gets a sentence whenever the run waits for the judge.
    """

    def __init__(
        self,
        settings: ScoreSettings,
        replicas: int = 1,
        on_wait: Callable[[str], None] | None = None,
        section: str = "reward",
    ) -> None:
        if settings.judge is None:
            rule, fix = "needs a judge to ask", f"set {section}.judge.url and {section}.judge.model"
            raise Refusal(f"{section}.kind=judge", rule, fix)
        if not settings.low < settings.high:
            value, rule = f"{section}.low={settings.low}", f"must be below {section}.high={settings.high}"
            raise Refusal(value, rule, "widen the range")
        self._settings = settings
        self._judge = settings.judge
        self._section = f"{section}.judge"
        self._key = key_of(settings.judge, self._section)
        self._on_wait = on_wait or (lambda text: None)
        cap = settings.judge.max_cost_per_step
        self._spending = Spending(None if cap is None else cap / replicas)
        self._counters: Counter[str] = Counter()
        # Its own generator: jitter must not move the run's random numbers.
        self._rng = random.Random()
        self._closed = False
        self._failures = Failures(
            f"The judge at {self._judge.url} gave no verdict on",
            f"{section}.max_failed_share",
            settings.max_failed_share,
            _fixes(self._section),
        )
        self._refuse_small_cap(replicas)
        asyncio.run(self._introduce())

    def grade(self, items: Sequence[GradingItem]) -> list[GradedAnswer]:
        """Rewards of `items`, in their order; None where there is no verdict.

        Raises `ScoringStopped` where the judge is away for longer than `patience`, takes no request any more, leaves
        too many of the items without a verdict (`max_failed_share`), or where the cost cap allows no verdict at all.
        """
        if self._closed:
            raise MegarlError("The judge is closed.")
        return asyncio.run(self._grade(items)) if items else []

    def take_first_failure(self) -> str | None:
        """A sentence about the first answer without a verdict, once."""
        return self._failures.take_first()

    def begin_step(self) -> None:
        """A new step, whose requests may cost `max_cost_per_step` again."""
        self._spending.begin_step()

    def take_counters(self) -> dict[str, int]:
        """What was counted since the last call, zeros left out.

        judge_requests: sent, small questions whether the judge is there included; judge_retries: answers asked about
        again; judge_unreadable_replies; judge_clipped: scores beyond 1..10; judge_input_tokens, judge_output_tokens;
        judge_estimated_replies: those whose tokens are estimated from the text's length, because the server did not
        count; judge_outages: times that the judge was away and came back.
        """
        taken = {name: number for name, number in self._counters.items() if number}
        self._counters.clear()
        return taken

    def close(self) -> None:
        """Refuse further work. May be called more than once."""
        self._closed = True

    def _client(self) -> ChatClient:
        # One per call: connections do not outlive the event loop, and servers close idle ones between steps anyway.
        return ChatClient(self._judge, self._key, self._counters, self._spending, self._section)

    def _watch(self, client: ChatClient) -> Watch:
        return Watch(client, self._judge, self._counters, self._rng, self._on_wait, self._section)

    def _refuse_small_cap(self, replicas: int) -> None:
        share, least = self._spending.limit, most_it_costs(self._judge, check_message(self._judge))
        if share is not None and share < least:
            raise Refusal(
                f"{self._section}.max_cost_per_step={self._judge.max_cost_per_step:g}",
                f"must pay for a verdict on each of {replicas} replica(s), and a short one may cost {least:.3g}",
                f"raise it, or lower {self._section}.max_tokens",
            )

    async def _introduce(self) -> None:
        """Ask the first, small question, waiting for a judge that is not there yet. Raises `Refusal`."""
        url = f"{self._section}.url={self._judge.url}"
        async with self._client() as client:
            try:
                _, failure = await self._watch(client).find(None, ("away", "busy"))
            except StillAway as away:
                rule = f"no judge answers there for {away.seconds:.0f} s (last seen: {away.seen})"
                raise Refusal(
                    url, rule, f"start the judge, correct the URL or raise {self._section}.patience"
                ) from None
        if failure is not None:
            rule = f"is of no use, since the judge answers the first request with {failure.seen}"
            fix = failure.fix or f"correct it or the other settings of {self._section} as the answer says"
            raise Refusal(url, rule, fix)

    async def _grade(self, items: Sequence[GradingItem]) -> list[GradedAnswer]:
        async with self._client() as client:
            watch = self._watch(client)
            call = _Call(
                self._settings,
                self._judge,
                client,
                watch,
                self._spending,
                self._counters,
                self._rng,
                self._failures,
                self._section,
            )
            try:
                return await call.run(items)
            finally:
                watch.close()


class _Call:
    """One batch of answers: as many at a time as `concurrency` allows, each asked about until it has its reward."""

    def __init__(
        self,
        settings: ScoreSettings,
        judge: JudgeSettings,
        client: ChatClient,
        watch: Watch,
        spending: Spending,
        counters: Counter[str],
        rng: random.Random,
        failures: Failures,
        section: str,
    ) -> None:
        self._settings = settings
        self._judge = judge
        self._client = client
        self._watch = watch
        self._spending = spending
        self._counters = counters
        self._rng = rng
        self._started_at = time.monotonic()
        self._failures = failures
        self._section = section

    async def run(self, items: Sequence[GradingItem]) -> list[GradedAnswer]:
        """The answers' rewards in order. Raises `ScoringStopped`."""
        graded: dict[int, GradedAnswer] = {}
        work = iter(enumerate(items))
        num_workers = min(self._judge.concurrency, len(items))
        self._failures.begin(len(items))
        workers = [asyncio.create_task(self._work(work, graded)) for _ in range(num_workers)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        self._failures.end()
        if self._spending.spent == 0 and all(answer.counter == "judge_cap" for answer in graded.values()):
            raise ScoringStopped(
                f"{self._section}.max_cost_per_step={self._judge.max_cost_per_step:g} pays for a verdict on none of "
                f"{len(items)} answer(s), with {self._spending.limit:.3g} for this replica. Fix: raise it, or shorten "
                "the answers."
            )
        return [graded[index] for index in range(len(items))]

    async def _work(self, work: Iterator[tuple[int, GradingItem]], graded: dict[int, GradedAnswer]) -> None:
        """Take the next answer and grade it, until none is left."""
        for index, item in work:
            graded[index] = await self._grade_one(item)
            progress.tick()

    async def _grade_one(self, item: GradingItem) -> GradedAnswer:
        """Ask about one answer until there is a verdict, its tries are used up, or the money is."""
        text = message_of(self._judge.template or TEMPLATE, item)
        asked, tries, spared = text, 0, SPARED_TRIES
        while True:
            await self._watch.ready()
            cost = most_it_costs(self._judge, asked)
            if not await self._spending.reserve(cost):
                return GradedAnswer(None, "judge_cap")
            sent_at = time.monotonic()
            try:
                return GradedAnswer(await self._reward(asked))
            except AskFailed as failed:
                failure = failed
            finally:
                self._spending.release(cost)
            if failure.kind == "refused":
                raise ScoringStopped(
                    f"The judge at {self._judge.url} takes no request any more, {self._elapsed():.0f} s into a call "
                    f"(last seen: {failure.seen}). Fix: {failure.fix}, then resume the run."
                )
            if failure.kind == "away" and await self._watch.was_away(sent_at, failure) and spared:
                spared -= 1
                continue
            if failure.kind == "rejected" or tries == self._judge.retries:
                self._failures.note(failure.counter, failure.seen)
                return GradedAnswer(None, failure.counter)
            self._counters["judge_retries"] += 1
            if failure.kind == "unreadable":
                asked = text + REMINDER
            else:
                self._watch.pause(failure)
                await asyncio.sleep(delay(tries, self._rng))
            tries += 1

    async def _reward(self, text: str) -> float:
        """The reward by one reply of the judge. Raises `AskFailed`, kind unreadable where it holds no clear score."""
        reply = await self._client.ask(text)
        self._watch.replied()
        # In a reply that was cut, a last `Score: 1` may be the beginning of `Score: 10`.
        score = read_score(reply.text) if reply.whole else None
        if score is None:
            self._counters["judge_unreadable_replies"] += 1
            what = "the unreadable verdict" if reply.whole else f"the verdict, cut at {self._section}.max_tokens,"
            raise AskFailed("unreadable", f"{what} {_tail(reply.text)!r}", "judge_unreadable")
        clipped = min(max(score, LOWEST), HIGHEST)
        self._counters["judge_clipped"] += clipped != score
        return scaled((clipped - LOWEST) / (HIGHEST - LOWEST), self._settings.low, self._settings.high)

    def _elapsed(self) -> float:
        return time.monotonic() - self._started_at


def key_of(judge: JudgeSettings, section: str) -> str | None:
    """The key from the environment; None where none is sent. Raises `Refusal` where the variable holds none.

    `section` is the key of `judge` in the run's file.
    """
    if judge.api_key_env is None:
        return None
    value, key = f"{section}.api_key_env={judge.api_key_env}", os.environ.get(judge.api_key_env, "").strip()
    if not key:
        rule = "must name an environment variable that holds the judge's key, and it is not set"
        raise Refusal(value, rule, f"export {judge.api_key_env}=...")
    # A header of HTTP carries no other; the key itself stands in no message.
    if not (key.isascii() and key.isprintable()):
        rule = "must hold one line of printable ASCII, as every key is, and holds other characters"
        raise Refusal(value, rule, f"put the key alone into {judge.api_key_env}")
    return key


def _tail(text: str, length: int = 100) -> str:
    """The end of a reply, where the score should be."""
    line = " ".join(text.split())
    return line if len(line) <= length else f"...{line[-length:]}"
