"""Texts to learn that are used again when their prompt returns; a state of the run."""

from __future__ import annotations

from typing import Any

from megarl.algorithms.plan import Generation, Text
from megarl.records import Key

#: A text as JSON has it: its number, its marks, and its token ids.
_Saved = tuple[int, dict[str, int], tuple[int, ...]]


class TextCache:
    """Texts that later steps may use again, by kind and prompt; the same on all ranks, and saved with checkpoints."""

    def __init__(self) -> None:
        # By kind and prompt the step that made the texts, and these. Entries are replaced, not changed: a saved state
        # shares them.
        self._entries: dict[str, tuple[int, tuple[_Saved, ...]]] = {}

    def of(self, generation: Generation, prompt: int, step: int) -> dict[int, Text] | None:
        """What an earlier step made for a prompt, by number, where it is new enough for `step`."""
        made, texts = self._entries.get(_name(generation.kind, prompt), (step, ()))
        if not made < step < made + generation.refresh_every:
            return None
        return {number: Text(tuple(ids), marks) for number, marks, ids in texts}

    def keep(self, step: int, key: Key, text: Text) -> None:
        """Keep what a step made. Of a prompt that was drawn twice in the step, the first draw's."""
        name = _name(key.kind, key.prompt)
        made, texts = self._entries.get(name, (step, ()))
        if made != step:
            texts = ()
        if all(number != key.number for number, _, _ in texts):
            self._entries[name] = (step, (*texts, (key.number, dict(text.marks), text.token_ids)))

    def forget(self, generation: Generation, step: int) -> None:
        """Forget what is too old for every step after `step`."""
        old = [name for name, (made, _) in self._entries.items() if made + generation.refresh_every <= step + 1]
        for name in old:
            if name.startswith(_name(generation.kind, "")):
                del self._entries[name]

    def state(self) -> dict[str, Any]:
        """All of it."""
        return dict(self._entries)

    def restore(self, state: dict[str, Any]) -> None:
        """Be as when `state` was returned, or saved as JSON."""
        self._entries = {
            name: (made, tuple((number, marks, tuple(ids)) for number, marks, ids in texts))
            for name, (made, texts) in state.items()
        }


def _name(kind: str, prompt: int | str) -> str:
    return f"{kind} {prompt}"
