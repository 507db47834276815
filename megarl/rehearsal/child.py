"""`python -m megarl.rehearsal.child FILE`: the rehearsal whose pickled arguments come on stdin; its report, or the
error meant for the user, goes to FILE. Started by `megarl.rehearsal.rehearse` alone."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

from megarl.errors import MegarlError


def main() -> None:
    """Rehearse, and leave the answer."""
    # The settings of an algorithm of the user's own are found where the process that started this one found them.
    sys.path[:], arguments = pickle.load(sys.stdin.buffer)
    arguments = pickle.loads(arguments)
    # First of all: it holds back what Megatron warns of.
    import megarl.parallel  # noqa: F401
    from megarl.rehearsal.build import build_report

    try:
        answer: object = build_report(*arguments)
    except MegarlError as error:
        answer = error
    Path(sys.argv[1]).write_bytes(pickle.dumps(answer))


if __name__ == "__main__":
    main()
