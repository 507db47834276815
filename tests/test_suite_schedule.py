"""The suite's own rules: which tests run in one process, and what a file may take."""

from __future__ import annotations

from pathlib import Path

import suite_schedule
from suite_schedule import FACTOR, GRACE, budget_faults, file_of, piece_of

TESTS = Path(__file__).parent


def test_files_are_pieces_but_for_those_named():
    assert piece_of("tests/test_ops.py::test_a[x::y]") == "test_ops.py"
    assert piece_of("tests/test_push.py::test_a[1]") != piece_of("tests/test_push.py::test_a[2]")
    assert piece_of("tests/test_slurm.py::test_a") == piece_of("tests/test_submit_slurm.py::test_b") == "slurm"
    assert file_of("tests/test_ops.py::test_a[a/test_b.py]") == "test_ops.py"


def test_files_that_are_named_exist():
    named = suite_schedule.SPLIT | set(suite_schedule.TOGETHER) | suite_schedule.PROCESSES
    named |= suite_schedule.read_durations().keys()
    assert not {name for name in named if not (TESTS / name).is_file()}


def test_a_file_that_outgrows_its_budget_is_named():
    written = {"a.py": 10.0, "b.py": 30.0, "c.py": 5.0}
    most = FACTOR * 10.0 + GRACE
    assert budget_faults({"a.py": most - 1, "b.py": 30.0, "c.py": 5.0, "new.py": GRACE - 1}, written) == []
    (fault,) = budget_faults({"a.py": most + 1, "b.py": 30.0, "c.py": 5.0}, written)
    assert fault.startswith(
        f"a.py took {most + 1:.0f} s, and 10 s are written down in durations.json: may take {most:.0f} s"
    )
    (fault,) = budget_faults({"a.py": 10.0, "b.py": 30.0, "c.py": 5.0, "new.py": GRACE + 1}, written)
    assert fault.startswith("new.py took")
    # On a machine that is three times as slow nothing is said of what took three times as long.
    assert budget_faults({name: 3 * seconds for name, seconds in written.items()}, written) == []
    # A part of the suite says nothing.
    assert budget_faults({"a.py": 1000.0}, written) == budget_faults({"a.py": 1000.0}, {}) == []
