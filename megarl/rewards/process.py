"""One grading process as the training process sees it, and the answer it works on."""

from __future__ import annotations

from megarl.parallel.helper import BACKSTOP_FACTOR, START_LIMIT, Deadline, Helper


class GradingProcess(Helper):
    """One grading process and the answer it works on."""

    def __init__(self, kind: str, time_limit: float) -> None:
        super().__init__("megarl.rewards.worker", kind, str(time_limit * BACKSTOP_FACTOR))
        self.ready = False
        self.tries = False
        """Whether it is at its function's first call."""
        self.item: int | None = None
        self.deadline = Deadline(self.process.pid, START_LIMIT)

    def assign(self, item: int | None, request: bytes, time_limit: float) -> bool:
        """Send the request of item number `item`, None for the first call; False where the process is gone.

        The process is waiting for a request, so it reads this one at once, however long it is.
        """
        self.item = item
        self.deadline = Deadline(self.process.pid, time_limit)
        return self.send(request)
