"""The verdict is told, and the policy may try again."""

from __future__ import annotations

from megarl.environments.base import Reply
from megarl.records import Prompt

#: Our choice, as all the defaults below.
MESSAGE = "That is not correct. Try again."


class Retry:
    """Tells the policy that its answer is not right, up to `tries` - 1 times.

    An answer is right from a reward of `right` on. `message` is said as the user's turn. The sample's reward is that of
    its last answer, less `cost` for each one before. An answer whose verdict cannot be found is the last one, and its
    sample has no reward.
    """

    VERDICT = True

    def __init__(self, tries: int = 2, right: float = 1.0, message: str = MESSAGE, cost: float = 0.0) -> None:
        if tries < 1:
            raise ValueError(f"tries={tries} must be 1 or more")
        self._left, self._right, self._message, self._cost = tries, right, message, cost
        self._spent = 0.0

    def start(self, prompt: Prompt) -> None:
        """The prompt stays as it is."""

    def turn(self, said: str, verdict: float | None) -> Reply:
        """The end where the answer is right, has no verdict or was the last one, else the message."""
        self._left -= 1
        if verdict is None:
            return Reply(counters=("retry_without_verdict",))
        reward = verdict - self._spent
        self._spent += self._cost
        if verdict >= self._right or not self._left:
            return Reply(reward=reward, counters=("retry_right",) if verdict >= self._right else ())
        return Reply([{"role": "user", "content": self._message}], reward, ("retry_told",))
