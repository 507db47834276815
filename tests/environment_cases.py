"""Environments as users write them, good and bad, for the tests of environments and of the turns."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import Any

from megarl.environments.base import Reply
from megarl.records import Prompt


class Echo:
    """Says back what it is told, and counts its turns; remembers between them."""

    def __init__(self, turns: int = 3, delay: float = 0.0, ends: str = "") -> None:
        self._turns, self._delay, self._ends, self._heard = turns, delay, ends, []

    def start(self, prompt: Prompt) -> Any:
        self._answer = prompt.answer
        self._drawn = random.random()

    def turn(self, said: str) -> Reply:
        self._heard.append(said)
        time.sleep(self._delay)
        if len(self._heard) == self._turns:
            return Reply(None, float(len(self._heard)), ["echoed"])
        return Reply(f"{self._answer} {self._drawn} {'|'.join(self._heard)}")


class Tokens:
    """Reads and writes token ids, and asks in ids of its own."""

    TOKENS = True

    def __init__(self, turns: int = 3, sleep: float = 0.0, own: int = 4, again: tuple[int, ...] = (50, 51, 52)) -> None:
        self._left, self._sleep, self._own, self._again = turns, sleep, own, again

    def start(self, prompt: Prompt) -> list[int] | None:
        return [*prompt.token_ids, self._own] if self._own else None

    def turn(self, said: list[int]) -> Reply:
        time.sleep(self._sleep)
        self._left -= 1
        return Reply(list(self._again) if self._left else None, sum(said) / 1000)


class Draws:
    """Answers with a token that it draws."""

    def start(self, prompt: Prompt) -> Any: ...

    def turn(self, said: str) -> Reply:
        return Reply([random.randrange(2, 129)], 0.0)


class Told:
    """Is told verdicts, and leaves the reward of its last turn to the run; may raise in that turn."""

    VERDICT = True

    def __init__(self, turns: int = 2) -> None:
        self._left = turns

    def start(self, prompt: Prompt) -> Any:
        self._deed = prompt.answer

    def turn(self, said: str, verdict: float | None) -> Reply:
        self._left -= 1
        if not self._left and self._deed == "raises":
            raise RuntimeError("no more")
        return Reply(f"{verdict}", reward=0.25, counters=("told",)) if self._left else Reply(counters=("told",))


class Misbehaves:
    """Does to a sample what its answer says."""

    def start(self, prompt: Prompt) -> Any:
        self._deed = prompt.answer
        if self._deed.startswith("start "):
            return self._do(self._deed.removeprefix("start "))
        return None

    def turn(self, said: str) -> Any:
        return self._do(self._deed)

    def _do(self, deed: str) -> Any:
        match deed:
            case "raises":
                raise RuntimeError("no more\nwords")
            case "exits":
                raise SystemExit(3)
            case "dies":
                os._exit(7)
            case "sleeps":
                time.sleep(60)
            case "spins":
                while True:
                    pass
            case "holds the lock":
                return __import__("re").match("(a*)*c", "a" * 40) == "a" * 30 + "b"
            case "dict":
                return {"observation": "x"}
            case "nan":
                return Reply("x", float("nan"))
            case "bool":
                return Reply("x", True)
            case "mixed":
                return Reply([1, "x"])  # type: ignore[list-item]
            case "number":
                return Reply(5)  # type: ignore[arg-type]
            case "empty":
                return Reply([])
            case "huge":
                return Reply("x" * 100_001)
            case "counters":
                return Reply("x", counters=[3])  # type: ignore[list-item]
            case "beyond":
                return Reply([7, 131])
            case "long":
                return Reply([7] * 60)
            case "closes its output":
                os.close(1)
        return Reply("fine", 0.5)


class Closes:
    """Says in a file that it was closed."""

    def __init__(self, file: str) -> None:
        self._file = Path(file)

    def start(self, prompt: Prompt) -> Any:
        return [{"role": "user", "content": "again: " + prompt.text}]

    def turn(self, said: str) -> Reply:
        return Reply([{"role": "user", "content": "and?"}])

    def close(self) -> None:
        self._file.write_text(self._file.read_text() + "closed\n" if self._file.exists() else "closed\n")


class Counted:
    """Says how many processes of its keeper there were when it started, and takes its time to close."""

    def start(self, prompt: Prompt) -> Any:
        keeper = os.getppid()
        self._seen = len(Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split())

    def turn(self, said: str) -> Reply:
        return Reply(str(self._seen))

    def close(self) -> None:
        time.sleep(0.5)


class NoTurn:
    def start(self, prompt: Prompt) -> None: ...


class WrongStops:
    STOPS = "</tool>"

    def start(self, prompt: Prompt) -> None: ...

    def turn(self, said: str) -> Reply:
        return Reply()


class NeedsArguments:
    def __init__(self, size: int) -> None: ...

    def start(self, prompt: Prompt) -> None: ...

    def turn(self, said: str) -> Reply:
        return Reply()


no_class = 5
