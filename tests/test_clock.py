"""Seconds per phase."""

from __future__ import annotations

import time

import pytest

from megarl.train.clock import Clock


def test_phases_inside_phases_are_counted_once() -> None:
    begun: list[str] = []
    clock = Clock(begun.append)
    start = time.perf_counter()
    with clock.phase("generate"):
        time.sleep(0.05)
        with clock.phase("push"):
            time.sleep(0.1)
        with pytest.raises(ValueError), clock.phase("push"):
            raise ValueError
    with clock.phase("generate"):
        time.sleep(0.05)
    passed = time.perf_counter() - start
    seconds = clock.take()
    assert begun == ["generate", "push", "push", "generate"]
    assert seconds["push"] >= 0.1 and seconds["generate"] >= 0.1
    assert sum(seconds.values()) == pytest.approx(passed, abs=0.01)
    assert clock.take() == {}


def test_a_part_of_a_phase_is_counted_apart() -> None:
    clock = Clock()
    with clock.phase("probes"):
        time.sleep(0.02)
        clock.count("influence", 0.015)
    seconds = clock.take()
    assert seconds["influence"] == 0.015 and 0.004 < seconds["probes"] < 0.5


def test_phases_have_their_place_in_time() -> None:
    clock = Clock()
    time.sleep(0.02)
    clock.align()
    for _ in range(2):
        with clock.phase("update"):
            time.sleep(0.01)
    time.sleep(0.02)
    with clock.phase("push"), clock.phase("save"):
        time.sleep(0.01)
    found = clock.take_intervals()
    # Two of one name without a pause between them are one; what is inside comes after what it is inside of.
    assert [one.name for one in found] == ["update", "push", "save"]
    update, push, save = found
    assert update.start == pytest.approx(0, abs=0.01) and update.seconds >= 0.02
    assert push.start >= 0.04 and save.start >= push.start and save.seconds <= push.seconds
    assert clock.take_intervals() == []
