"""Environments in their processes: what they give, and what becomes of those that misbehave."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from megarl.config.environments import EnvironmentSettings
from megarl.environments.workers import Answered, Environments
from megarl.errors import MegarlError, Refusal
from megarl.records import Prompt

CASES = "environment_cases"


def prompt(answer: str = "4", index: int = 0) -> Prompt:
    return Prompt(index, (5, 6, 7), "2+2=", answer, extra={"column": None})


@pytest.fixture(autouse=True)
def found_by_children(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


@contextmanager
def environments(kind: str, trial: Prompt | None = None, **settings: Any) -> Iterator[Environments]:
    found = Environments(EnvironmentSettings(kind=kind, **settings), trial)
    try:
        yield found
    finally:
        found.close()


def heard(of: Environments, number: int, limit: float = 60.0) -> dict[int, Answered]:
    """The next replies of `number` samples."""
    found: dict[int, Answered] = {}
    until = time.monotonic() + limit
    while len(found) < number and time.monotonic() < until:
        found |= {one.sample: one for one in of.poll(0.1)}
    assert len(found) == number
    return found


def test_samples_have_environments_of_their_own_that_remember():
    with environments(f"{CASES}:Echo") as echo:
        before: list[float] = []
        for round_ in range(2):  # the second in processes that have served before
            for sample in range(3):
                echo.start(sample, prompt(f"answer {sample}"), seed=sample)
            assert all(one.given is None for one in heard(echo, 3).values())
            for sample in range(3):
                echo.turn(sample, f"first {sample}")
            first = heard(echo, 3)
            drawn = [float(first[sample].given["observation"].split()[2]) for sample in range(3)]
            assert len(set(drawn)) == 3
            if round_:
                assert drawn == before  # seeds decide
            before = drawn
            for turn in ("second", "third"):
                for sample in range(3):
                    echo.turn(sample, f"{turn} {sample}")
                last = heard(echo, 3)
                for sample, one in last.items():
                    given = one.given
                    if turn == "second":
                        assert given["observation"].endswith(f" first {sample}|second {sample}")
                    else:
                        assert given == {"observation": None, "reward": 3.0, "counters": ["echoed"]}
            for sample in range(3):
                echo.end(sample)


def test_calls_that_wait_overlap():
    with environments(f"{CASES}:Echo", arguments={"delay": 0.5}) as echo:
        for sample in range(20):
            echo.start(sample, prompt())
        heard(echo, 20)
        began = time.monotonic()
        for sample in range(20):
            echo.turn(sample, "x")
        assert time.monotonic() - began < 0.5  # asking does not wait
        heard(echo, 20)
        assert time.monotonic() - began < 5.0  # one after the other they take 10


DEEDS = {
    # what the sample's environment does: (counter, end of the sentence)
    "raises": ("environment_raised", "raised RuntimeError: no more words (environment_cases.py, line"),
    "exits": ("environment_raised", "raised SystemExit: 3"),
    "dies": ("environment_died", "ended its process (exit status 7)"),
    "sleeps": ("environment_timed_out", "gave no reply within 1 s"),
    "spins": ("environment_timed_out", "gave no reply within 1 s"),
    "holds the lock": ("environment_timed_out", "gave no reply within 1 s"),
    "dict": ("environment_bad_reply", "gave {'observation': 'x'} (a dict) from turn instead of a Reply"),
    "nan": ("environment_bad_reply", "gave the reward nan (a float), which is no finite number"),
    "bool": ("environment_bad_reply", "gave the reward True (a bool), which is no finite number"),
    "mixed": (
        "environment_bad_reply",
        "gave a list from turn of something else than messages (role and content) or token ids",
    ),
    "number": ("environment_bad_reply", "gave 5 (an int) from turn instead of text, messages or token ids"),
    "empty": ("environment_bad_reply", "gave [] (a list) from turn instead of text, messages or token ids"),
    "huge": ("environment_bad_reply", "gave 100001 characters from turn, more than 100000"),
    "counters": ("environment_bad_reply", "gave the counters [3] (a list), which are no list of names"),
    "start raises": ("environment_raised", "raised RuntimeError: no more words (environment_cases.py, line"),
    "start dict": (
        "environment_bad_reply",
        "gave {'observation': 'x'} (a dict) from start instead of text, messages or token ids",
    ),
    "closes its output": (None, ""),
    "nothing": (None, ""),
}


def test_one_that_misbehaves_costs_its_own_sample_alone():
    """All at once, twice: the second time where processes were left dead, hung or idle."""
    with environments(f"{CASES}:Misbehaves", time_limit=1.0) as cases:
        for _ in range(2):
            for sample, deed in enumerate(DEEDS):
                cases.start(sample, prompt(deed))
            found = heard(cases, len(DEEDS))
            begun = [sample for sample, one in found.items() if one.failure is None]
            for sample in begun:
                cases.turn(sample, "well?")
            found |= heard(cases, len(begun))
            for sample, (deed, (counter, seen)) in enumerate(DEEDS.items()):
                assert found[sample].failure == counter, deed
                assert found[sample].seen.startswith(seen), (deed, found[sample].seen)
                if counter is None:
                    assert found[sample].given == {"observation": "fine", "reward": 0.5, "counters": []}
                cases.end(sample)
        first = cases.take_first_failure()
        assert first is not None and first.startswith(
            "rollout.environment.kind=environment_cases:Misbehaves failed on a sample for the first time: it "
        )
        assert cases.take_first_failure() is None


def test_what_is_not_awaited_any_more_is_not_heard_of():
    with environments(f"{CASES}:Misbehaves", time_limit=30.0) as cases:
        cases.start(0, prompt("sleeps"))
        cases.start(1, prompt("nothing"))
        heard(cases, 2)
        cases.turn(0, "x")
        cases.turn(1, "x")
        cases.end(0)
        assert [one.sample for one in cases.poll(10)] == [1]
        assert cases.poll(0.2) == []
        cases.start(0, prompt("nothing"))
        assert heard(cases, 1)[0].failure is None
        with pytest.raises(MegarlError, match="asked while it has not yet replied"):
            for _ in range(2):
                cases.turn(1, "x")


def test_a_keeper_that_is_killed_is_started_again():
    with environments(f"{CASES}:Echo") as echo:
        for sample in range(2):
            echo.start(sample, prompt())
        heard(echo, 2)
        echo._keeper.process.kill()
        echo._keeper.process.wait()
        echo.turn(0, "x")
        lost = heard(echo, 1)[0]
        assert lost.failure == "environment_died" and lost.seen == "ended its keeper (SIGKILL)"
        echo.turn(1, "x")
        assert heard(echo, 1)[1].failure == "environment_died"
        echo.start(0, prompt())
        assert heard(echo, 1)[0].failure is None


def test_no_process_is_left(tmp_path: Path):
    file = tmp_path / "closed"
    with environments(f"{CASES}:Closes", arguments={"file": str(file)}) as closes:
        closes.start(0, prompt())
        assert heard(closes, 1)[0].given == [{"role": "user", "content": "again: 2+2="}]
        closes.end(0)
        closes.start(1, prompt())  # in the same process, after the first was closed
        heard(closes, 1)
        keeper = closes._keeper.process.pid
        forked = children(keeper)
        assert len(forked) in (1, 2)
    assert file.read_text() == "closed\n"
    for process in forked:
        until = time.monotonic() + 5
        while Path(f"/proc/{process}").exists() and time.monotonic() < until:
            time.sleep(0.01)
        assert not Path(f"/proc/{process}").exists()


def test_there_are_never_more_processes_than_workers():
    """Those that still end a sample are among them."""
    with environments(f"{CASES}:Counted", trial=prompt(), workers=2) as counted:
        for first in (0, 2, 4):
            for sample in (first, first + 1, first + 100):
                counted.start(sample, prompt())
            # The third waits for a process, and its sample ends before there is one.
            counted.end(first + 100)
            heard(counted, 2)
            for sample in (first, first + 1):
                counted.turn(sample, "how many?")
            said = [one.given["observation"] for one in heard(counted, 2).values()]
            assert set(said) <= {"1", "2"} and "2" in said
            for sample in (first, first + 1):
                counted.end(sample)


def children(process: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def test_hung_processes_end_with_their_keeper():
    """As where the whole run is killed: nobody is there to end it."""
    with environments(f"{CASES}:Misbehaves", time_limit=0.5) as cases:
        cases.start(0, prompt("nothing"))
        heard(cases, 1)
        (forked,) = children(cases._keeper.process.pid)
        os.kill(cases._keeper.process.pid, 9)
        until = time.monotonic() + 10
        while Path(f"/proc/{forked}").exists() and time.monotonic() < until:
            time.sleep(0.02)
        assert not Path(f"/proc/{forked}").exists()


KIND = "rollout.environment.kind=environment_cases:"
PATH_FIX = "Fix: correct the path, give the file's path (folder/file.py:Class), or put its folder on PYTHONPATH."
CLASS_FIX = "Fix: correct the class, or its arguments (rollout.environment.arguments)."
REFUSED = {
    "Missing": "must lead to a class with the methods start and turn (AttributeError: module 'environment_cases' has "
    f"no attribute 'Missing'). {PATH_FIX}",
    "no_class": "must lead to a class with the methods start and turn (no_class is no class but 5 (an int)). "
    f"{PATH_FIX}",
    "NoTurn": f"must lead to a class with the methods start and turn (class NoTurn has no method turn). {PATH_FIX}",
    "WrongStops": "must lead to a class with the methods start and turn (class WrongStops must have STOPS a tuple of "
    f"texts). {PATH_FIX}",
    "NeedsArguments": "must start with the first row of the data, and called with () it raised TypeError: "
    "NeedsArguments.__init__() missing 1 required positional argument: 'size'. ",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_class_of_no_use_is_refused(name: str):
    with pytest.raises(Refusal) as refused, environments(f"{CASES}:{name}", trial=prompt()):
        pass
    assert str(refused.value).startswith(f"{KIND}{name}: {REFUSED[name]}"), str(refused.value)


def test_the_first_row_is_tried_before_anything_is_built():
    with pytest.raises(Refusal) as refused, environments(f"{CASES}:Misbehaves", trial=prompt("start raises")):
        pass
    assert str(refused.value).startswith(
        f"{KIND}Misbehaves: must start with the first row of the data, and called with () it raised RuntimeError: "
        "no more words (environment_cases.py, line "
    )
    assert str(refused.value).endswith(CLASS_FIX)
    with environments(f"{CASES}:Misbehaves", trial=prompt("nothing")) as fine:
        assert not fine.traits.verdict


def test_retry_is_told_the_verdict():
    with environments("retry", trial=prompt(), arguments={"tries": 3, "cost": 0.1}) as retry:
        assert retry.traits.verdict
        for sample in range(3):
            retry.start(sample, prompt())
        heard(retry, 3)
        rewards = {0: [0.0, 1.0], 1: [0.5, 0.25, 0.0], 2: [None]}
        told = [{"role": "user", "content": "That is not correct. Try again."}]
        for sample, verdicts in rewards.items():
            for number, verdict in enumerate(verdicts):
                retry.turn(sample, "4", verdict)
                given = heard(retry, 1)[sample].given
                last = number == len(verdicts) - 1
                assert given["observation"] == (None if last else told)
                if verdict is not None:
                    assert given["reward"] == pytest.approx(verdict - 0.1 * number)
        assert given == {"observation": None, "reward": None, "counters": ["retry_without_verdict"]}
