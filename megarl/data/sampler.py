"""The order in which prompts are drawn. Torch-free; its whole state is one integer."""

from __future__ import annotations

import random

from megarl.errors import Refusal


class PromptStream:
    """An endless stream of the row numbers 0 … num_prompts-1, each once per epoch.

    With `shuffle` every epoch has an order of its own, drawn from (seed, epoch). Which rows come next
    depends on nothing but the number of rows taken so far, so a restored stream continues exactly.

    >>> stream = PromptStream(3, seed=0, shuffle=False)
    >>> stream.take(4), stream.state()
    ([0, 1, 2, 0], 4)

    Raises `Refusal` where there is no prompt to draw.
    """

    def __init__(self, num_prompts: int, seed: int, shuffle: bool) -> None:
        if num_prompts < 1:
            raise Refusal(f"num_prompts={num_prompts}", "must be at least 1", "give a data file with usable rows")
        self._num_prompts = num_prompts
        self._seed = seed
        self._shuffle = shuffle
        self._cursor = 0
        self._epoch = -1
        self._order: list[int] = []

    def take(self, count: int) -> list[int]:
        """The next `count` row numbers; they run on into the next epoch."""
        rows = []
        for _ in range(count):
            epoch, position = divmod(self._cursor, self._num_prompts)
            if epoch != self._epoch:
                self._epoch, self._order = epoch, self._epoch_order(epoch)
            rows.append(self._order[position])
            self._cursor += 1
        return rows

    def state(self) -> int:
        """The number of rows taken since the start of the run."""
        return self._cursor

    def restore(self, state: int) -> None:
        """Continue after `state` rows. Raises `Refusal` where that is negative."""
        if state < 0:
            raise Refusal(f"data cursor {state}", "must not be negative", "restore a checkpoint that is complete")
        self._cursor = state

    def _epoch_order(self, epoch: int) -> list[int]:
        order = list(range(self._num_prompts))
        if self._shuffle:
            # A text seed is hashed as a whole, so neighbouring seeds and epochs share nothing.
            random.Random(f"prompts {self._seed} {epoch}").shuffle(order)
        return order
