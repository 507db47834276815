"""What an environment is, and what is checked of what it gives.

One instance of its class plays with one sample, in a process of its own (`megarl.environments.keeper`):
`start(prompt)` may replace what the policy is asked, `turn(said)` answers what it wrote.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Protocol

from megarl.config.environments import BUILTIN_KINDS
from megarl.config.user_code import Unusable, load, named
from megarl.records import Prompt

#: Characters, or tokens, of an observation or of a prompt's messages, past which the reply is a bad one. Our choice.
LONGEST = 100_000
#: Counters of samples whose environment failed, which costs them their reward.
RAISED, TIMED_OUT = "environment_raised", "environment_timed_out"
BAD_REPLY, DIED, PROMPT_TOO_LONG = "environment_bad_reply", "environment_died", "environment_prompt_too_long"

#: One turn of a conversation: its role and its content.
Message = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Reply:
    """What an environment answers to a turn of the policy's.

    `observation`: what the policy reads next, as text or token ids that are put after what it wrote as they are, or as
    messages, which the tokenizer's chat template renders; None: the environment has come to its end. `reward`: that of
    the sample, should it end with this turn; each reply says it anew, and a sample's last one counts. None: the run's
    reward for that turn, which is the verdict where the class wants verdicts; so a sample whose last turn has no
    verdict has no reward. `counters`: names that are counted in the step's metrics.
    """

    observation: str | Sequence[int] | Sequence[Message] | None = None
    reward: float | None = None
    counters: Sequence[str] = ()


class Environment(Protocol):
    """What a class must have. It is called with the arguments of `rollout.environment.arguments`."""

    def start(self, prompt: Prompt) -> str | Sequence[int] | Sequence[Message] | None:
        """What the policy is asked, as messages (a text: one of the user's) or token ids; None: the prompt as it is."""
        ...

    def turn(self, said: Any) -> Reply:
        """Answer what the policy wrote in a turn: its text, or its token ids where the class says `TOKENS = True`.

        A class that says `VERDICT = True` is called `turn(said, verdict)`, with the run's reward of a sample that ends
        with that turn (None where none could be found). A method `close()` is called when the sample has come to its
        end.
        """
        ...


@dataclass(frozen=True, slots=True)
class Traits:
    """What a class says of itself: whether it reads `tokens`, wants a `verdict`, and after which texts (`STOPS`) a turn
    of the policy's ends where the tokenizer has them as single tokens."""

    tokens: bool = False
    verdict: bool = False
    stops: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Verdict:
    """The run's reward of a sample that ends with a turn; None where none could be found. `counters`: what was counted
    while it was found; `terms`: of a reward that is a sum, what each term gave."""

    reward: float | None
    counters: Mapping[str, int] = field(default_factory=dict)
    terms: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Heard:
    """What came of asking sample `index`'s environment, in tokens: those of the prompt (after its start; None: as it
    was), or of the observation (None: the end). `counters`: what it and the `verdict` that it was told counted.
    `failure` is the counter of what went wrong, in place of all else."""

    index: int
    token_ids: tuple[int, ...] | None = None
    reward: float | None = None
    counters: Mapping[str, int] = field(default_factory=dict)
    failure: str | None = None
    verdict: Verdict | None = None


def environment_class(kind: str) -> type:
    """The class that `rollout.environment.kind` names. Raises `Unusable` where it is none, or lacks a method."""
    found = load(BUILTIN_KINDS.get(kind, kind))
    name = kind.rpartition(":")[2]
    if not isinstance(found, type):
        raise Unusable(f"{name} is no class but {named(found)}")
    for method in ("start", "turn"):
        if not callable(getattr(found, method, None)):
            raise Unusable(f"class {name} has no method {method}")
    return found


def traits_of(found: type) -> Traits:
    """What the class says of itself. Raises `Unusable` where that is of other types."""
    tokens, verdict = getattr(found, "TOKENS", False), getattr(found, "VERDICT", False)
    stops: Any = getattr(found, "STOPS", ())
    if not (isinstance(tokens, bool) and isinstance(verdict, bool)):
        raise Unusable(f"class {found.__name__} must have TOKENS and VERDICT true or false")
    if not isinstance(stops, tuple | list) or not all(isinstance(one, str) and one for one in stops):
        raise Unusable(f"class {found.__name__} must have STOPS a tuple of texts")
    return Traits(tokens, verdict, tuple(stops))


class BadReply(Exception):
    """What an environment gave is of another type than it must be; the message continues a sentence about it."""


def checked_prompt(value: Any) -> Any:
    """What `start` returned, in JSON's types: None, a text, token ids or messages. Raises `BadReply`."""
    if value is None:
        return None
    return _checked_said(value, "start")


def checked_reply(value: Any) -> dict[str, Any]:
    """What `turn` returned, in JSON's types. Raises `BadReply`."""
    if not isinstance(value, Reply):
        raise BadReply(f"gave {named(value)} from turn instead of a Reply")
    reward, counters = value.reward, value.counters
    if reward is not None:
        if isinstance(reward, bool) or not isinstance(reward, Real) or not math.isfinite(reward):
            raise BadReply(f"gave the reward {named(reward)}, which is no finite number")
        reward = float(reward)
    if isinstance(counters, str) or not isinstance(counters, Sequence) or not all(map(_is_name, counters)):
        raise BadReply(f"gave the counters {named(counters)}, which are no list of names")
    observation = None if value.observation is None else _checked_said(value.observation, "turn")
    return {"observation": observation, "reward": reward, "counters": list(counters)}


def _checked_said(value: Any, method: str) -> Any:
    if isinstance(value, str):
        said: Any = _checked_text(value, method)
        length = len(value)
    elif not isinstance(value, Sequence) or not value:
        raise BadReply(f"gave {named(value)} from {method} instead of text, messages or token ids")
    elif all(isinstance(one, Integral) and not isinstance(one, bool) and int(one) >= 0 for one in value):
        said, length = [int(one) for one in value], len(value)
    elif all(_is_message(one) for one in value):
        said = [{name: _checked_text(text, method) for name, text in one.items()} for one in value]
        length = sum(len(one["content"]) for one in value)
    else:
        raise BadReply(f"gave a list from {method} of something else than messages (role and content) or token ids")
    if length > LONGEST:
        unit = "tokens" if isinstance(said, list) and isinstance(said[0], int) else "characters"
        raise BadReply(f"gave {length} {unit} from {method}, more than {LONGEST}")
    return said


def _checked_text(text: str, method: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadReply(f"gave a text from {method} with halves of characters (surrogates)") from None
    return text


def _is_message(value: Any) -> bool:
    if not isinstance(value, Mapping) or set(value) != {"role", "content"}:
        return False
    return all(isinstance(one, str) for one in value.values())


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 80
