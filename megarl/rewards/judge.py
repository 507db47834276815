"""Rewards by a language model that scores answers, asked over HTTP.

A verdict that failed or cannot be read is never a low reward: the answer is asked about again, and after that stays
without reward. Where the judge is away as a whole the run waits; where it can no longer be used the run stops.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megarl.config.rewards import ScoreSettings
from megarl.errors import MegarlError, Refusal, ScoringStopped
from megarl.rewards.answers import GradedAnswer, GradingItem, scaled
from megarl.rewards.chat import ChatClient, check_message, most_it_costs
from megarl.rewards.spending import Spending
from megarl.rewards.verdict import HIGHEST, LOWEST, REMINDER, TEMPLATE, message_of, read_score
from megarl.servers.asking import Asking
from megarl.servers.client import AskFailed, key_of
from megarl.servers.failures import Failures
from megarl.servers.watch import Watch


def _fixes(section: str) -> dict[str, str]:
    """What helps where too many answers fail, by what most of them failed of."""
    return {
        "judge_unreadable": f"use a judge that writes the line `Score: N`, ask for it in {section}.template, or raise "
        f"{section}.max_tokens",
        "judge_timeout": f"raise {section}.time_limit or lower {section}.concurrency",
        "judge_error": f"see the judge's own log, or lower {section}.concurrency",
    }


@dataclass(slots=True)
class _Open:
    """An answer that is asked about, and whether the judge must be reminded of the form of a verdict."""

    item: GradingItem
    reminded: bool = False


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
        self._key = key_of(settings.judge, self._section, "judge")
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
        return Watch(client, self._rng, self._on_wait)

    def _refuse_small_cap(self, replicas: int) -> None:
        share, least = self._spending.limit, most_it_costs(self._judge, check_message(self._judge))
        if share is not None and share < least:
            raise Refusal(
                f"{self._section}.max_cost_per_step={self._judge.max_cost_per_step:g}",
                f"must pay for a verdict on each of {replicas} replica(s), and a short one may cost {least:.3g}",
                f"raise it, or lower {self._section}.max_tokens",
            )

    async def _introduce(self) -> None:
        """Ask the first, small question. Raises `Refusal`."""
        async with self._client() as client:
            await self._watch(client).introduce()

    async def _grade(self, items: Sequence[GradingItem]) -> list[GradedAnswer]:
        async with self._client() as client:
            watch = self._watch(client)

            async def ask(one: _Open, failure: AskFailed | None) -> GradedAnswer:
                one.reminded |= failure is not None and failure.kind == "unreadable"
                return await self._verdict(client, one.item, one.reminded)

            try:
                found = await Asking(client, watch, self._failures, self._rng, ask).answers([*map(_Open, items)])
            finally:
                watch.close()
        graded = [GradedAnswer(None, one.counter) if isinstance(one, AskFailed) else one for one in found]
        if self._spending.spent == 0 and all(answer.counter == "judge_cap" for answer in graded):
            raise ScoringStopped(
                f"{self._section}.max_cost_per_step={self._judge.max_cost_per_step:g} pays for a verdict on none of "
                f"{len(items)} answer(s), with {self._spending.limit:.3g} for this replica. Fix: raise it, or shorten "
                "the answers."
            )
        return graded

    async def _verdict(self, client: ChatClient, item: GradingItem, reminded: bool) -> GradedAnswer:
        """The answer with its reward by one reply of the judge, or without one where the money is used up.

        Raises `AskFailed`, of kind unreadable where the reply holds no clear score.
        """
        text = message_of(self._judge.template or TEMPLATE, item) + (REMINDER if reminded else "")
        cost = most_it_costs(self._judge, text)
        if not await self._spending.reserve(cost):
            return GradedAnswer(None, "judge_cap")
        try:
            reply = await client.ask(text)
        finally:
            self._spending.release(cost)
        # In a reply that was cut, a last `Score: 1` may be the beginning of `Score: 10`.
        score = read_score(reply.text) if reply.whole else None
        if score is None:
            self._counters["judge_unreadable_replies"] += 1
            what = "the unreadable verdict" if reply.whole else f"the verdict, cut at {self._section}.max_tokens,"
            raise AskFailed("unreadable", f"{what} {_tail(reply.text)!r}", "judge_unreadable")
        clipped = min(max(score, LOWEST), HIGHEST)
        self._counters["judge_clipped"] += clipped != score
        return GradedAnswer(scaled((clipped - LOWEST) / (HIGHEST - LOWEST), self._settings.low, self._settings.high))


def _tail(text: str, length: int = 100) -> str:
    """The end of a reply, where the score should be."""
    line = " ".join(text.split())
    return line if len(line) <= length else f"...{line[-length:]}"
