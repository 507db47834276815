"""A grading process: reads one request per line from standard input, answers with one line each.

`main(KIND, BACKSTOP_SECONDS)` is what `megarl.rewards.grader` starts. It imports neither torch nor vllm.

Lines are JSON. First line out: `{"ready": true}` or `{"refused": why}`. Request: `[text, [answer, ...], source,
{column: value}]`. Reply: `{"reward": number}` or `{"error": why}`; a rule of megarl's adds what it took for the answer
and why it decided so (`found`, `why`).
"""

from __future__ import annotations

import inspect
import json
import resource
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megarl.config import user_code
from megarl.parallel.helping import backstop, send, take_pipes
from megarl.rewards.math import RULES, decide, prepare

#: f(text, answer, source), with further columns of the data set by name.
RewardFunction = Callable[..., Any]

#: Address space of a process that grades by the built-in rules: SymPy may try to evaluate 9**9**9.
BUILTIN_MEMORY_BYTES = 4 << 30


class NoNumber(Exception):
    """A reward function returned something else than a number."""


def reward_function(kind: str) -> RewardFunction:
    """The user's function that `reward.kind` names. Raises `Unusable` where a path does not lead to a function."""
    function = user_code.load(kind)
    if not callable(function):
        raise user_code.Unusable(f"{kind.rpartition(':')[2]} is no function but {user_code.named(function)}")
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
    raise NoNumber(f"returned {user_code.named(value)}, which is no number")


def _replier(kind: str) -> Callable[..., dict[str, Any]]:
    """From the fields of a request to the reply. Raises as `reward_function`, and what a function's import raises."""
    if kind not in RULES:
        function = reward_function(kind)
        return lambda *fields: {"reward": best_reward(function, *fields)}
    resource.setrlimit(resource.RLIMIT_AS, (BUILTIN_MEMORY_BYTES, BUILTIN_MEMORY_BYTES))
    if kind != "boxed":
        prepare()

    def decided(text: str, answers: Sequence[str], source: str, extra: Mapping[str, Any]) -> dict[str, Any]:
        decision = decide(kind, text, answers)
        return {"reward": float(decision.right), "found": decision.found, "why": decision.why}

    return decided


def main(kind: str, backstop_seconds: str) -> int:
    """Serve until standard input closes. The exit status is 1 where `kind` cannot be imported."""
    requests, replies = take_pipes()
    try:
        reply_to = _replier(kind)
    except Exception as error:
        why = str(error) if isinstance(error, user_code.Unusable) else user_code.described(error)
        send(replies, {"refused": why})
        return 1
    send(replies, {"ready": True})
    for line in requests:
        request = json.loads(line)
        with backstop(float(backstop_seconds)):
            try:
                reply = reply_to(*request)
            except NoNumber as error:
                reply = {"error": str(error)}
            except BaseException as error:  # an exit included
                reply = {"error": f"raised {user_code.described(error)}"}
        send(replies, reply)
    return 0
