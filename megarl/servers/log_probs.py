"""Log-probs of sequences under a model that somebody serves, asked for as those of a prompt's tokens."""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from megarl.config.parameter_sets import ServedSet
from megarl.config.servers import LogProbServerSettings
from megarl.data.tokenizer import Tokenizer, differing_token, spread_tokens
from megarl.errors import Refusal
from megarl.servers.asking import Asking
from megarl.servers.client import AskFailed, ServerClient, key_of
from megarl.servers.failures import Failures
from megarl.servers.watch import Watch

#: Tokens of the small question, spread over the vocabulary, whose texts are compared with the run's. Our choice.
COMPARED = 256


class PromptClient(ServerClient):
    """Asks for the log-probs of a prompt's tokens over the completions protocol: `echo`, and nothing generated."""

    def __init__(
        self,
        settings: LogProbServerSettings,
        key: str | None,
        counters: Counter[str],
        section: str,
        who: str,
        spread: Sequence[int],
    ) -> None:
        super().__init__(settings, key, counters, section, who)
        self._spread = spread
        self.texts: list[str] = []
        """The server's texts of the small question's tokens, once it has answered that."""

    async def check(self, time_limit: float) -> None:
        """Ask about tokens from all over the vocabulary."""
        await self._ask(self._spread, time_limit)

    async def ask(self, token_ids: Sequence[int]) -> np.ndarray:
        """Log-probs of all tokens but the first, each given those before it, float32 (L - 1,). Raises `AskFailed`."""
        return await self._ask(token_ids, None)

    async def _ask(self, token_ids: Sequence[int], time_limit: float | None) -> np.ndarray:
        body = await self._body(lambda: self._post(token_ids), time_limit)
        try:
            found = json.loads(body)["choices"][0]["logprobs"]
            values, texts = found["token_logprobs"], found["tokens"]
            count = len(values)
        except (ValueError, TypeError, LookupError, RecursionError):
            seen = f"a reply without log-probs of the prompt: {self._quoted(body)}"
            raise self._failed("garbage", seen) from None
        if count != len(token_ids):
            raise self._failed("garbage", f"{count} log-probs of {len(token_ids)} tokens")
        for value in values[1:]:
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise self._failed("garbage", f"a log-prob that is no finite number: {value}")
        if token_ids is self._spread:
            self.texts = [text if isinstance(text, str) else "" for text in texts]
        self.replied_at = time.monotonic()
        return np.array(values[1:], np.float32)

    async def _post(self, token_ids: Sequence[int]) -> str:
        response = await self._client.completions.with_raw_response.create(
            model=self.settings.model,
            prompt=list(token_ids),
            echo=True,
            logprobs=0,
            max_tokens=0,
            extra_headers=self._headers,
        )
        return response.text


class LogProbServer:
    """A served set of weights, which gives log-probs of sequences.

    Asks at construction, to see whether the server is there and its model has the run's vocabulary. Raises `Refusal`
    where it is not there within `patience` seconds, turns the question down, or has another vocabulary;
    `ScoringStopped` where it asks to wait longer than that. `on_wait` gets a sentence whenever the run waits for it.
    """

    def __init__(
        self, served: ServedSet, tokenizer: Tokenizer, longest: int, on_wait: Callable[[str], None] | None = None
    ) -> None:
        """`longest` is that of the sequences that will be asked about, in tokens."""
        self._settings, self._section, self._who = served.server, served.setting, served.name
        self._key = key_of(served.server, served.setting, served.name)
        self._on_wait = on_wait or (lambda text: None)
        self._spread = spread_tokens(tokenizer, min(COMPARED, longest))
        self._counters: Counter[str] = Counter()
        # Its own generator: jitter must not move the run's random numbers.
        self._rng = random.Random()
        self._failures = Failures(
            f"The {self._who} at {self._settings.url} gave no log-probs of",
            f"{self._section}.max_failed_share",
            self._settings.max_failed_share,
            {
                f"{self._who}_timeout": f"raise {self._section}.time_limit or lower {self._section}.concurrency",
                f"{self._who}_error": f"see the {self._who}'s own log, and whether its context holds the run's longest "
                "sequence",
            },
        )
        asyncio.run(self._introduce(tokenizer))

    def log_probs(
        self, sequences: Sequence[Sequence[int]], stop: Callable[[], bool] = lambda: False
    ) -> list[np.ndarray | None]:
        """Log-probs of each sequence's tokens but the first, float32 (L - 1,); None where there are none to be had.

        Raises `ScoringStopped` where the server stays away, takes no request any more, or fails on too many sequences;
        `AskingGivenUp` where `stop` says so meanwhile.
        """
        return asyncio.run(self._log_probs(sequences, stop)) if sequences else []

    def take_counters(self) -> dict[str, int]:
        """What was counted since the last call, zeros left out, each name after the set's: requests, small questions
        included; retries; outages, times that the server was away and came back; and of sequences that stay without
        log-probs error and timeout."""
        taken = {name: number for name, number in self._counters.items() if number}
        self._counters.clear()
        return taken

    def take_first_failure(self) -> str | None:
        """A sentence about the first sequence without log-probs, once."""
        return self._failures.take_first()

    def _client(self) -> PromptClient:
        return PromptClient(self._settings, self._key, self._counters, self._section, self._who, self._spread)

    async def _introduce(self, tokenizer: Tokenizer) -> None:
        async with self._client() as client:
            await Watch(client, self._rng, self._on_wait).introduce()
            texts = client.texts
        differs = differing_token(tokenizer, dict(zip(self._spread, texts, strict=True)))
        if differs is not None:
            token, own, other = differs
            raise Refusal(
                f"{self._section}.model={self._settings.model}",
                f"must have this run's tokenizer, but token {token} is {other!r} there and {own!r} here",
                f"serve a {self._who} of the same vocabulary",
            )

    async def _log_probs(self, sequences: Sequence[Sequence[int]], stop: Callable[[], bool]) -> list[np.ndarray | None]:
        async with self._client() as client:
            watch = Watch(client, self._rng, self._on_wait)

            async def ask(tokens: Sequence[int], failure: Any) -> np.ndarray:
                return await client.ask(tokens)

            try:
                found = await Asking(client, watch, self._failures, self._rng, ask).answers(sequences, stop)
            finally:
                watch.close()
        self._counters.update(one.counter for one in found if isinstance(one, AskFailed))
        return [None if isinstance(one, AskFailed) else one for one in found]
