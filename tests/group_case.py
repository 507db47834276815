"""Groups made by hand: what all ranks know of a prompt's answers and texts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from megarl.algorithms.base import Group
from megarl.records import Head, Key, Prompt, Stretch


def head_of(key: Key, length: int, *, holder: int | None = 0, text: bool = False, **further) -> Head:
    """A trajectory of `length` tokens, all of the policy or all of a text to learn."""
    stretches = (Stretch(0, length, "text" if text else "policy", None if text else 0),) if length else ()
    return Head(key, holder, stretches, **further)


def group_of(
    rewards: Iterable[float | None],
    lengths: Iterable[int] | None = None,
    thinking: Sequence[int | None] | None = None,
    *,
    explanations: Sequence[int] = (),
    finished: Sequence[bool] | None = None,
    number: int = 0,
    prompt: Prompt | None = None,
) -> Group:
    """A group whose answers have these rewards, lengths and ends of thinking, and explanations of these lengths."""
    prompt = prompt or Prompt(number, (1,), "", "")
    rewards = tuple(rewards)
    sizes = tuple(lengths) if lengths is not None else (1,) * len(rewards)
    heads = [
        head_of(
            Key(prompt.index, 0, k),
            size,
            reward=reward,
            marks={} if thinking is None or thinking[k] is None else {"thinking": thinking[k]},
            finish_reason="stop" if finished is None or finished[k] else "length",
        )
        for k, (reward, size) in enumerate(zip(rewards, sizes, strict=True))
    ]
    heads += [
        head_of(Key(prompt.index, 0, k, "explanation"), size, text=True, marks={"chain": size - 1})
        for k, size in enumerate(explanations)
    ]
    return Group(number, prompt, 0, tuple(heads))
