"""The order in which prompts are drawn. Torch-free; its whole state is one integer."""

from __future__ import annotations

import random
from collections.abc import Sequence

from megarl.errors import Refusal


class PromptStream:
    """An endless stream of the row numbers 0 … num_prompts-1, each once per epoch.

    With `shuffle` every epoch has an order of its own, drawn from (seed, epoch). Which rows come next
    depends on nothing but the number of rows taken so far, so a restored stream continues exactly.

    >>> stream = PromptStream(3, seed=0, shuffle=False)
    >>> stream.take(4), stream.state()
    ([0, 1, 2, 0], 4)

    `name` tells the order apart from those of other streams with the same seed. Raises `Refusal` where there is no
    prompt to draw.
    """

    def __init__(self, num_prompts: int, seed: int, shuffle: bool, name: str = "prompts") -> None:
        if num_prompts < 1:
            raise Refusal(f"num_prompts={num_prompts}", "must be at least 1", "give a data file with usable rows")
        self._num_prompts = num_prompts
        self._seed = seed
        self._shuffle = shuffle
        self._name = name
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

    @property
    def epoch(self) -> float:
        """How often the rows were gone through."""
        return self._cursor / self._num_prompts

    def _epoch_order(self, epoch: int) -> list[int]:
        order = list(range(self._num_prompts))
        if self._shuffle:
            # A text seed is hashed as a whole, so neighbouring seeds and epochs share nothing.
            random.Random(f"{self._name} {self._seed} {epoch}").shuffle(order)
        return order


class MixedStream:
    """Row numbers of several parts that lie one after the other, each part drawn in proportion to its weight.

    A part of weight w, where all weights make 1, gives its row number k (from 0) at the time (k + 1/2) / w, and rows
    come in the order of their times: of any n rows from the first on it has given about n·w. So a part may be in
    another epoch than the others. All else is as in `PromptStream`. Our choice: chance would give small parts an
    unsteady share.

    >>> stream = MixedStream([100, 2], [3.0, 1.0], seed=0, shuffle=False)
    >>> stream.take(8)
    [0, 1, 100, 2, 3, 4, 101, 5]
    """

    def __init__(
        self, counts: Sequence[int], weights: Sequence[float], seed: int, shuffle: bool, name: str = "prompts"
    ) -> None:
        self._starts = [sum(counts[:number]) for number in range(len(counts))]
        self._total = sum(counts)
        self._shares = [weight / sum(weights) for weight in weights]
        self._streams = [PromptStream(n, seed, shuffle, name=f"{name} of {i}") for i, n in enumerate(counts)]
        self._cursor = 0

    def take(self, count: int) -> list[int]:
        """The next `count` row numbers."""
        rows = []
        for _ in range(count):
            part = self._next()
            rows += [self._starts[part] + row for row in self._streams[part].take(1)]
            self._cursor += 1
        return rows

    def state(self) -> int:
        """The number of rows taken since the start of the run."""
        return self._cursor

    def restore(self, state: int) -> None:
        """Continue after `state` rows. Raises `Refusal` where that is negative."""
        # Every part's rows up to a time shortly before, of which there are fewer; the few others one by one.
        time = state - len(self._streams)
        for part, stream in enumerate(self._streams):
            stream.restore(min(state, 0))
            taken = max(int(time * self._shares[part]), 0)
            while self._due(part, taken) <= time:
                taken += 1
            while taken and self._due(part, taken - 1) > time:
                taken -= 1
            stream.restore(taken)
        self._cursor = sum(stream.state() for stream in self._streams)
        while self._cursor < state:
            self.take(1)

    @property
    def epoch(self) -> float:
        """How many rows were drawn for each row that there is."""
        return self._cursor / self._total

    def _next(self) -> int:
        """The part of the next row: the one whose time comes first, of equal ones the first."""
        times = [self._due(part, stream.state()) for part, stream in enumerate(self._streams)]
        return times.index(min(times))

    def _due(self, part: int, number: int) -> float:
        return (number + 0.5) / self._shares[part]
