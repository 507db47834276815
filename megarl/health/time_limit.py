"""The time limit of the job that this process is in, as Slurm says it. Free of torch."""

from __future__ import annotations

import os
import time

#: Seconds by which Slurm's signal ahead of the limit may come earlier than asked for.
_EARLY = 60.0


def is_near(notice: float) -> bool:
    """Whether what asks to stop now is the signal that comes `notice` seconds ahead of the limit, or the limit itself.

    False outside Slurm, and where it does not say when the job ends.
    """
    text = os.environ.get("SLURM_JOB_END_TIME", "")
    return text.isdigit() and float(text) - time.time() < notice + _EARLY
