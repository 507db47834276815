"""A bound on what a replica's requests to the judge may cost in a step."""

from __future__ import annotations

import asyncio


class Spending:
    """Money spent in this step, and money set aside for requests in flight. Without a `limit` everything is allowed.

    The dearest that a request can become is set aside before it is sent, so that what is spent stays within the limit.
    """

    def __init__(self, limit: float | None) -> None:
        self.limit = limit
        self.spent = 0.0
        self._set_aside: list[float] = []
        self._exhausted = False
        self._waiting: list[asyncio.Future[None]] = []

    def begin_step(self) -> None:
        """A new step with the whole limit to spend."""
        self.spent = 0.0
        self._exhausted = False

    async def reserve(self, cost: float) -> bool:
        """Set `cost` aside, waiting for requests in flight that may turn out cheaper; False where it never fits.

        Once one request was turned away so, all are until the next step: otherwise short answers would go on being
        rewarded after long ones no longer are. A request that exceeds the whole limit is turned away alone.
        """
        if self.limit is not None and cost > self.limit:
            return False
        while not self._exhausted and not self._fits(cost):
            if not self._set_aside:
                self._exhausted = True
                break
            change = asyncio.get_running_loop().create_future()
            self._waiting.append(change)
            await change
        if self._exhausted:
            return False
        self._set_aside.append(cost)
        return True

    def release(self, cost: float) -> None:
        """End what `reserve(cost)` began; `charge` what it really cost before."""
        self._set_aside.remove(cost)
        waiting, self._waiting = self._waiting, []
        for change in waiting:
            if not change.done():
                change.set_result(None)

    def charge(self, cost: float) -> None:
        """Note money as spent."""
        self.spent += cost

    def _fits(self, cost: float) -> bool:
        return self.limit is None or self.spent + sum(self._set_aside) + cost <= self.limit
