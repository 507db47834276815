"""What a run carries beside its weights: states as they were when a step ended, and back again through JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest

from megarl.algorithms.grpo import Grpo
from megarl.data.sampler import MixedStream
from megarl.train.carry import Carry, Counters, Table


class Mean:
    """A running mean, as an algorithm may keep it."""

    def __init__(self) -> None:
        self.total, self.seen = 0.0, 0

    def add(self, value: float) -> None:
        self.total, self.seen = self.total + value, self.seen + 1

    def state(self) -> dict[str, Any]:
        return {"total": self.total, "seen": self.seen}

    def restore(self, state: dict[str, Any]) -> None:
        self.total, self.seen = state["total"], state["seen"]


def owners(seed: int = 3) -> dict[str, Any]:
    return {
        "stream": MixedStream([5, 9], [1.0, 2.0], seed, shuffle=True),
        "counters": Counters(),
        "texts": Table[list](),
        "algorithm": Mean(),
    }


def step(held: dict[str, Any], number: int) -> list[int]:
    """Something of everything."""
    rows = held["stream"].take(4)
    held["counters"].count("groups_dropped", number % 2)
    held["texts"][str(rows[0])] = [number, {"0": [2, rows]}]
    held["algorithm"].add(0.1 * number)
    return rows


def through_json(carry: Carry) -> dict[str, Any]:
    return json.loads(json.dumps(carry.states()))


def test_a_restored_run_goes_on_as_the_one_that_was_saved() -> None:
    held, again = owners(), owners()
    carry = Carry(held)
    for number in range(1, 4):
        step(held, number)
        carry.step_ends()
    Carry(again).restore(through_json(carry))
    assert again["counters"] == {"groups_dropped": 2} and again["algorithm"].state() == held["algorithm"].state()
    assert [step(again, number) for number in (4, 5)] == [step(held, number) for number in (4, 5)]
    assert again["texts"] == held["texts"] and again["algorithm"].total == held["algorithm"].total


def test_a_step_that_is_given_up_leaves_no_trace() -> None:
    held = owners()
    carry = Carry(held)
    step(held, 1)
    carry.step_ends()
    before = through_json(carry)
    row = step(held, 2)[0]
    held["texts"][str(row)] = [2, {}]
    assert through_json(carry) == before
    carry.step_ends()
    assert through_json(carry) != before


def test_states_before_the_first_step_are_those_of_a_new_run() -> None:
    assert Carry(owners()).states() == {
        "stream": 0,
        "counters": {},
        "texts": {},
        "algorithm": {"total": 0.0, "seen": 0},
    }


def test_another_algorithm_begins_anew() -> None:
    held, again = owners(), owners()
    carry = Carry(held)
    step(held, 1)
    carry.step_ends()
    restored = Carry(again)
    restored.restore(through_json(carry) | {"algorithm": {"of": "another"}}, anew=("algorithm",))
    assert again["algorithm"].seen == 0 and again["stream"].state() == 4
    assert restored.states()["stream"] == 4


def test_a_state_that_was_not_saved_is_missed() -> None:
    with pytest.raises(KeyError, match="texts"):
        Carry(owners()).restore({"stream": 0, "counters": {}, "algorithm": {}})


def test_what_was_before_is_forgotten() -> None:
    table = Table({"a": 1})
    table.restore({"b": 2})
    assert table == {"b": 2}


def test_an_algorithm_has_no_state_unless_it_says_so() -> None:
    found: Any = object.__new__(Grpo)
    assert found.state() == {}
    found.restore({})


def test_counters_of_nothing_have_no_entry() -> None:
    counters = Counters()
    counters.count("none", 0)
    counters.count("two")
    counters.count("two")
    assert counters == {"two": 2}
