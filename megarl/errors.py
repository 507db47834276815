"""Errors a user is meant to read.

Every error megarl raises on purpose derives from `MegarlError`. The command line prints its message alone, without a
traceback, and exits with its `exit_code`.
"""

from collections.abc import Iterator


class MegarlError(Exception):
    """Base of all errors with a message written for the user."""

    exit_code = 2
    #: Whether somebody has said it to the user already: of an error that all ranks raise, one speaks.
    delivered = False


class Refusal(MegarlError):
    """Input that cannot be used: says the value, the rule it breaks, and the fix.

    >>> str(Refusal("parallel.tensor=3", "must divide the model's 8 attention heads", "use 1, 2, 4 or 8"))
    "parallel.tensor=3: must divide the model's 8 attention heads. Fix: use 1, 2, 4 or 8."
    """

    def __init__(self, value: str, rule: str, fix: str) -> None:
        self.value = value
        self.rule = rule
        self.fix = fix
        super().__init__(f"{_cut(value)}: {_cut(rule).rstrip('.')}. Fix: {_cut(fix).rstrip('.')}.")

    def __reduce__(self) -> tuple[type["Refusal"], tuple[str, str, str]]:
        # Exceptions pickle by their message alone, which would lose the three parts on the way between processes.
        return type(self), (self.value, self.rule, self.fix)


def _cut(text: str) -> str:
    """As much of a text as a message can hold."""
    return text if len(text) <= 1000 else f"{text[:300]}... ({len(text)} characters)"


class Interrupted(MegarlError):
    """The run ended before its last step for a reason outside it: asked to stop, a rank or host gone, a hang.

    Nothing that was saved is lost: the same command with resume=auto goes on. The exit code is EX_TEMPFAIL of
    sysexits.h, at which `slurm/train.sbatch` puts the job back into the queue.
    """

    exit_code = 75


class RankLost(Interrupted):
    """This rank waits for one that is gone or silent, as far as it knows; a watchdog may know more."""


class PhaseError(MegarlError):
    """A part was touched in a phase in which it sleeps; names the phase and the part."""


class TrainingStopped(MegarlError):
    """The run stopped itself (for example too many skipped updates); what was saved stays."""


class ScoringStopped(MegarlError):
    """Answers can no longer be scored (a judge or teacher is away, refuses, fails too often); what was saved stays."""


def with_causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and what led to it, one behind the other: a library's own may hide the system's."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
