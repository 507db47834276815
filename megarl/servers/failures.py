"""What happens where a reward, or a server, fails on answers: it is counted, said once, and past a share it ends the
run.

A reward that is broken looks like a policy that is bad: the numbers alone do not tell one from the other.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping

from megarl.errors import ScoringStopped

#: Answers over which the share is taken where fewer are graded together: of a handful, one or two may fail by chance.
#: Our choice.
WINDOW = 100
#: At the start, before there are as many, the share is taken of this many answers. Our choice.
FEWEST = 10


class Failures:
    """The failures of one reward, or of one server.

    `setting` names the setting that bounds their share at `allowed`. `failed_on` begins the sentence that ends the run:
    it is followed by how many of how many answers. `fixes` say what helps, by counter.
    """

    def __init__(self, failed_on: str, setting: str, allowed: float, fixes: Mapping[str, str]) -> None:
        self._failed_on = failed_on
        self._setting = setting
        self._allowed = allowed
        self._fixes = fixes
        self._earlier: deque[tuple[int, int]] = deque()
        """Failures and answers of calls before, the latest ones."""
        self._total = 0
        self._counted: Counter[str] = Counter()
        self._first: str | None = None
        self._told = False

    def begin(self, total: int) -> None:
        """A call begins that grades `total` answers. One that did not come to its end is forgotten."""
        self._total = total
        self._counted.clear()
        while self._earlier and total + sum(answers for _, answers in self._earlier) - self._earlier[0][1] >= WINDOW:
            self._earlier.popleft()

    def note(self, counter: str, seen: str) -> None:
        """There is nothing for an answer; `seen` says how.

        Raises `ScoringStopped` past the share, as soon as that is certain.
        """
        self._counted[counter] += 1
        if self._first is None:
            self._first = seen
        failed = self._counted.total() + sum(failures for failures, _ in self._earlier)
        answers = self._total + sum(total for _, total in self._earlier)
        if failed > self._allowed * max(answers, FEWEST):
            fix = self._fixes[self._counted.most_common(1)[0][0]]
            raise ScoringStopped(
                f"{self._failed_on} {failed} of {answers} answers, more than {self._setting}={self._allowed:g} allows "
                f"(first seen: {self._first}). Fix: {fix}, then resume the run."
            )

    def end(self) -> None:
        """The call has come to its end."""
        self._earlier.append((self._counted.total(), self._total))

    def take_first(self) -> str | None:
        """A sentence about the first failure, when it is asked for the first time after it; else None."""
        if self._first is None or self._told:
            return None
        self._told = True
        return f"{self._failed_on} an answer for the first time: {self._first}"
