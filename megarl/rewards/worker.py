"""A grading process: reads one request per line from standard input, answers with one line each.

Run as `python -m megarl.rewards.worker KIND BACKSTOP_SECONDS`. It is started fresh rather than forked,
because the training process holds communication and engine threads that do not survive a fork, and it
imports neither torch nor vllm.

Lines are JSON. First line out: `{"ready": true}` or `{"refused": why}`. Request: `[text, [answer, ...],
source]`. Reply: `{"reward": number}` or `{"error": why}`.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, TextIO, cast

from megarl.rewards.math import boxed_equals, math_equals

RewardFunction = Callable[[str, str, str], float]

#: Address space of a process that grades by the built-in rules: SymPy may try to evaluate 9**9**9.
BUILTIN_MEMORY_BYTES = 4 << 30


def reward_function(kind: str) -> RewardFunction:
    """The function f(text, answer, source) that `reward.kind` names.

    Built-in kinds give 1.0 or 0.0. Raises ImportError, AttributeError, TypeError or ValueError where an
    import path does not lead to a callable.
    """
    if kind == "math":
        return lambda text, answer, source: float(math_equals(text, answer))
    if kind == "boxed":
        return lambda text, answer, source: float(boxed_equals(text, answer))
    module_name, colon, function_name = kind.partition(":")
    if not colon or not module_name or not function_name:
        raise ValueError("an import path looks like package.module:function")
    function = getattr(importlib.import_module(module_name), function_name)
    if not callable(function):
        raise TypeError(f"{function_name} in {module_name} is not a function")
    return cast(RewardFunction, function)


def best_reward(function: RewardFunction, text: str, answers: Sequence[str], source: str) -> float:
    """The greatest reward over the accepted `answers`; NaN stays NaN."""
    rewards = [float(function(text, answer, source)) for answer in answers]
    return next((reward for reward in rewards if reward != reward), max(rewards))


def _private_pipes() -> tuple[TextIO, TextIO]:
    """Take standard input and output away for the protocol: what a reward function prints goes to standard error."""
    requests = os.fdopen(os.dup(0), "r", encoding="utf-8", newline="\n")
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8", newline="\n")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    return requests, replies


def _send(replies: TextIO, message: dict[str, Any]) -> None:
    replies.write(json.dumps(message) + "\n")
    replies.flush()


def main(kind: str, backstop_seconds: float) -> int:
    """Serve until standard input closes. The exit status is 1 where `kind` cannot be imported."""
    # A scheduler sends them to every process of a run; what is graded then is still wanted. The end comes by the pipe.
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    requests, replies = _private_pipes()
    builtin = kind in ("math", "boxed")
    try:
        function = reward_function(kind)
        if builtin:
            resource.setrlimit(resource.RLIMIT_AS, (BUILTIN_MEMORY_BYTES, BUILTIN_MEMORY_BYTES))
            math_equals("1", "2")  # imports the slow part before the clock of the first answer runs
    except Exception as error:
        _send(replies, {"refused": f"{type(error).__name__}: {error}"})
        return 1
    _send(replies, {"ready": True})
    for line in requests:
        text, answers, source = json.loads(line)
        # The parent enforces the time limit. This alarm, which no Python code can delay because it has no
        # handler, ends a hanging process whose parent was killed first.
        signal.setitimer(signal.ITIMER_REAL, backstop_seconds)
        try:
            reply = {"reward": best_reward(function, text, answers, source)}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        signal.setitimer(signal.ITIMER_REAL, 0)
        _send(replies, reply)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], float(sys.argv[2])))
