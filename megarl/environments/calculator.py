"""A calculator that the policy may call while it answers."""

from __future__ import annotations

from megarl.environments.arithmetic import NoValue, value_of, written
from megarl.environments.base import Reply
from megarl.records import Prompt

OPEN, CLOSE = "<tool>", "</tool>"


class Calculator:
    """Answers a call at the end of a turn, `<tool>12*34</tool>`, with `<result>408</result>`.

    What cannot be computed is answered with `<result>error: why</result>`. A turn that does not end with a call is the
    answer, and the run's reward grades it. Where the tokenizer has `</tool>` as a single token, a turn ends right after
    it; with another, where the policy ends it.
    """

    STOPS = (CLOSE,)

    def start(self, prompt: Prompt) -> None:
        """The prompt stays as it is."""

    def turn(self, said: str) -> Reply:
        """The result of the call that the turn ends with; the end where there is none."""
        call = called(said)
        if call is None:
            return Reply(counters=("calculator_call_not_last",) if OPEN in said else ())
        try:
            if isinstance(call, NoValue):
                raise call
            result, counter = written(value_of(call)), "calculator_calls"
        except NoValue as error:
            result, counter = f"error: {error}", "calculator_errors"
        return Reply(f"<result>{result}</result>", counters=(counter,))


def called(said: str) -> str | NoValue | None:
    """The expression of the call that a turn ends with; why it is none, where the call is malformed; None without one.

    >>> called("so it is <tool>12*34</tool>"), called("so it is 408")
    ('12*34', None)
    """
    said = said.rstrip()
    start = said.rfind(OPEN)
    if said.endswith(CLOSE):
        before = said[: -len(CLOSE)]
        if start < 0 or before.rfind(CLOSE) > start:
            return NoValue(f"{CLOSE} without {OPEN}")
        if before.rfind(OPEN, 0, start) > before.rfind(CLOSE, 0, start):
            return NoValue("a call within a call")
        return before[start + len(OPEN) :]
    if start >= 0 and said.rfind(CLOSE) < start:
        return NoValue(f"the call is not closed with {CLOSE}")
    return None
