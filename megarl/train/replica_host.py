"""The environments of an engine replica, as each of its ranks sees them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from megarl.config.environments import EnvironmentSettings
from megarl.data.tokenizer import Tokenizer
from megarl.environments.base import Verdict
from megarl.environments.host import Host, build
from megarl.environments.verdicts import Grade, Said
from megarl.records import Prompt
from megarl.rollout.engine import Engine


class ReplicaHost:
    """`host` is there on the replica's first rank; `stop_token_ids` end a turn, and are known to all. Collective over
    the replica to make.

    `trial` is a row of the data to try the environment with. Raises `Refusal` on the first rank where the class cannot
    be used.
    """

    def __init__(self, settings: EnvironmentSettings, tokenizer: Tokenizer, engine: Engine, trial: Prompt) -> None:
        self._grade: Grade | None = None
        self.host: Host | None = build(settings, tokenizer, trial, self._verdicts) if engine.speaks else None
        self.stop_token_ids: tuple[int, ...] = engine.told(self.host.stop_token_ids if self.host is not None else ())

    @contextmanager
    def grading(self, grade: Grade) -> Iterator[None]:
        """Inside, `grade` finds the verdicts of turns for environments that want them; in a thread of its own."""
        self._grade = grade
        yield
        self._grade = None

    def take_first_failure(self) -> str | None:
        """See `Host.take_first_failure`."""
        return None if self.host is None else self.host.take_first_failure()

    def close(self) -> None:
        """End all processes. May be called more than once."""
        if self.host is not None:
            self.host.close()

    def _verdicts(self, said: Sequence[Said]) -> Sequence[Verdict]:
        return [Verdict(None)] * len(said) if self._grade is None else self._grade(said)
