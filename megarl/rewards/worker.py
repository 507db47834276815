"""A grading process: reads one request per line from standard input, answers with one line each.

`main(KIND, BACKSTOP_SECONDS)` is what `megarl.rewards.grader` starts. It is started fresh rather than forked, because
the training process holds communication and engine threads that do not survive a fork, and it imports neither torch nor
vllm.

Lines are JSON. First line out: `{"ready": true}` or `{"refused": why}`. Request: `[text, [answer, ...], source,
{column: value}]`. Reply: `{"reward": number}` or `{"error": why}`.
"""

from __future__ import annotations

import inspect
import json
import os
import resource
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

from megarl.config import user_code
from megarl.parallel import terminal
from megarl.rewards.math import boxed_equals, math_equals, prepare

#: f(text, answer, source), with further columns of the data set by name.
RewardFunction = Callable[..., Any]

#: Address space of a process that grades by the built-in rules: SymPy may try to evaluate 9**9**9.
BUILTIN_MEMORY_BYTES = 4 << 30


class NoNumber(Exception):
    """A reward function returned something else than a number."""


def reward_function(kind: str) -> RewardFunction:
    """The function that `reward.kind` names. Built-in kinds give 1.0 or 0.0.

    Raises `Unusable` where a path does not lead to a function.
    """
    if kind == "math":
        return lambda text, answer, source: float(math_equals(text, answer))
    if kind == "boxed":
        return lambda text, answer, source: float(boxed_equals(text, answer))
    function = user_code.load(kind)
    if not callable(function):
        raise user_code.Unusable(f"{kind.rpartition(':')[2]} is no function but {_named(function)}")
    return function


def columns_for(function: RewardFunction, extra: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of `extra` that `function` takes by name; all where it takes any, as `**columns` does.

    A column in a record goes by its own name, what stands behind the last dot.
    """
    if not extra:
        return {}
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # a function written in C that does not say
        return {}
    by_position = {parameter.name for parameter in parameters[:3]}
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    named = {
        parameter.name
        for parameter in parameters
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    short = {column.rpartition(".")[2]: value for column, value in extra.items()}
    return {name: value for name, value in short.items() if name not in by_position and (takes_any or name in named)}


def best_reward(
    function: RewardFunction, text: str, answers: Sequence[str], source: str, extra: Mapping[str, Any]
) -> float:
    """The greatest reward over the accepted `answers`; NaN stays NaN. Raises `NoNumber`, and what the function does."""
    columns = columns_for(function, extra)
    rewards = [_number(function(text, answer, source, **columns)) for answer in answers]
    return next((reward for reward in rewards if reward != reward), max(rewards))


def _number(value: Any) -> float:
    """A number of any type, such as NumPy's, or a truth value, as a float. Text is no number."""
    if not isinstance(value, str | bytes | bytearray):
        try:
            return float(value)
        except OverflowError:
            return float("inf") if value > 0 else float("-inf")
        except (TypeError, ValueError):
            pass
    raise NoNumber(f"returned {_named(value)}, which is no number")


def _named(value: Any) -> str:
    """A value in a message: itself where it is short and more than an address, and its type."""
    if value is None:
        return "None"
    try:
        text = " ".join(repr(value).encode(errors="replace").decode().split())
    except Exception:
        text = ""
    kind = type(value).__name__
    article = "an" if kind[:1].lower() in "aeiou" else "a"
    tells = 0 < len(text) <= 60 and not text.startswith("<")
    return f"{text} ({article} {kind})" if tells else f"{article} {kind}"


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
    # A scheduler or a terminal sends them to every process of a run; what is graded then is still wanted. The end comes
    # by the pipe.
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    requests, replies = _private_pipes()
    # A reward that prints must not fail because nobody reads it.
    terminal.keep()
    try:
        function = reward_function(kind)
        if kind in ("math", "boxed"):
            resource.setrlimit(resource.RLIMIT_AS, (BUILTIN_MEMORY_BYTES, BUILTIN_MEMORY_BYTES))
            if kind == "math":
                prepare()
    except Exception as error:
        why = str(error) if isinstance(error, user_code.Unusable) else user_code.described(error)
        _send(replies, {"refused": why})
        return 1
    _send(replies, {"ready": True})
    for line in requests:
        request = json.loads(line)
        # The parent enforces the time limit. This alarm, which no Python code can delay because it has no
        # handler, ends a hanging process whose parent was killed first.
        signal.setitimer(signal.ITIMER_REAL, backstop_seconds)
        try:
            reply = {"reward": best_reward(function, *request)}
        except NoNumber as error:
            reply = {"error": str(error)}
        except BaseException as error:  # an exit included
            reply = {"error": f"raised {user_code.described(error)}"}
        signal.setitimer(signal.ITIMER_REAL, 0)
        _send(replies, reply)
    return 0
