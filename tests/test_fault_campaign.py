"""The fault campaign in its short form, and that it would see what must not be."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

TOOLS = Path(__file__).resolve().parent.parent / "tools"
sys.path.insert(0, str(TOOLS))

places = importlib.import_module("faults.places")
plan = importlib.import_module("faults.plan")
report = importlib.import_module("faults.report")
runs = importlib.import_module("faults.runs")
verdict = importlib.import_module("faults.verdict")

#: One of each, those whose runs say most.
SHORT = ("kill", "hang", "stall", "term", "group", "disk-full", "flip", "no-latest", "network", "reward")


@pytest.mark.processes
@pytest.mark.timeout(1800)
def test_ten_faults_end_well(tmp_path: Path):
    command = [sys.executable, str(TOOLS / "fault_campaign.py"), "--out", str(tmp_path), "--faults", "10"]
    command += ["--kinds", *SHORT]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=1700)
    results = report.read(tmp_path)
    bad = [one for one in results if one["outcome"] not in verdict.GOOD]
    seen = [f"{one['name']}: {one['outcome']} ({one['why']}); {one['seconds']:.0f} s; {one['said']}" for one in bad]
    if done.returncode:
        pytest.fail("\n".join([*seen, done.stdout[-2000:], done.stderr[-2000:]]), pytrace=False)
    expected = set[str](SHORT)
    # What cannot be made here is said, and nothing else is left out.
    for kind, why in (("network", places.why_no_hosts()), ("disk-full", places.why_no_disk(tmp_path / "try"))):
        if why is not None:
            expected.remove(kind)
            assert f"skipped that need {'network' if kind == 'network' else 'a small disk'}" in done.stdout
    assert {one["kind"] for one in results} == expected
    assert (tmp_path / "campaign.png").stat().st_size > 10_000
    assert "| kill | SIGKILL of a rank | 1 | 1 | 0 | 0 |" in (tmp_path / "report.md").read_text()

    # The same command again has nothing left to do.
    again = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=120)
    assert again.returncode == 0, again.stderr[-3000:]
    assert report.read(tmp_path) == results

    # Results of two seeds do not mix.
    other = subprocess.run([*command, "--seed", "2"], capture_output=True, text=True, timeout=120)
    assert other.returncode == 2 and "--seed 2: must be 1 as in" in other.stderr

    # A fault that did not end well is seen in the exit code.
    with open(tmp_path / "results.jsonl", "a") as file:
        file.write(json.dumps(results[0] | {"outcome": verdict.HUNG, "why": "as said"}) + "\n")
    failed = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=120)
    assert failed.returncode == 1
    assert f"- {results[0]['name']}: hung: as said" in (tmp_path / "report.md").read_text()


def test_a_seed_decides_all_faults():
    kinds = list(plan.KINDS)
    whole = plan.plan(5, plan.WHOLE, kinds)
    assert plan.plan(5, plan.WHOLE, kinds) == whole
    assert plan.plan(6, plan.WHOLE, kinds) != whole
    assert plan.plan(5, 40, kinds) == whole[:40]
    assert len(whole) == plan.WHOLE >= 100
    assert Counter(fault.kind for fault in whole) == {kind.name: kind.share for kind in plan.KINDS.values()}
    # Every phase is killed, stopped and stalled in.
    for kind in ("kill", "hang", "stall"):
        assert {fault.phase for fault in whole if fault.kind == kind} >= set(plan.PHASES)


def seen(fault: Any, **changes: Any) -> Any:
    """What a good end of that fault, a rank killed in update, looks like; `changes` make it another one."""
    one = verdict.Seen.of(fault)
    one.seconds, one.limit, one.code, one.resume_code = 2.0, 20.0, 75, 0
    one.note = {"rank": 1, "phase": "update", "before": "step", "since": 3.0, "watched": True}
    one.said = ["rank 1 on here has died in phase update; rank 0 waits in all_reduce"]
    for name, value in changes.items():
        setattr(one, name, value)
    return one


@pytest.mark.parametrize(
    ("changes", "outcome"),
    [
        ({}, verdict.RECOVERED),
        ({"ended": False}, verdict.HUNG),
        ({"lost": ["step_000002"]}, verdict.LOST),
        ({"differs": "other weights in x"}, verdict.WRONG_WEIGHTS),
        ({"resume_code": 2}, verdict.WRONG_END),
        ({"code": 1}, verdict.WRONG_END),
        ({"traceback": True}, verdict.NO_MESSAGE),
        ({"said": [""]}, verdict.NO_MESSAGE),
        ({"said": ["rank 0 on here has died in phase update"]}, verdict.WRONG_NAME),
        ({"said": ["rank 1 on here has died in phase save"]}, verdict.WRONG_NAME),
        ({"said": ["rank 1 on here has died in phase step"]}, verdict.WRONG_NAME),
        ({"said": ["rank 1, process 12, was ended by SIGKILL"]}, verdict.WRONG_NAME),
        ({"seconds": 21.0}, verdict.LATE),
    ],
)
def test_what_must_not_be_is_seen(changes: dict[str, Any], outcome: str):
    fault = plan.Fault(1, "kill", "pair", "update", 1, 0.5, 0.5, 0)
    found = seen(fault, **changes)
    verdict.judge(fault, found)
    assert found.outcome == outcome, found.why


def test_a_phase_may_be_too_new_to_be_known():
    fault = plan.Fault(1, "kill", "pair", "update", 1, 0.5, 0.5, 0)
    note = {"rank": 1, "phase": "update", "before": "step", "since": 0.1, "watched": True}
    found = seen(fault, note=note, said=["rank 1 on here has died in phase step"])
    verdict.judge(fault, found)
    assert found.outcome == verdict.RECOVERED


def test_a_full_disk_is_a_sentence_with_code_2():
    fault = plan.Fault(1, "disk-full", "pair", "save", 0, 0.5, 0.5, 0)
    for code, said, outcome in (
        (2, "runs has no room: No space left on device", verdict.REFUSED),
        (75, "runs has no room: No space left on device", verdict.WRONG_END),
        (2, "rank 0 failed", verdict.NO_MESSAGE),
    ):
        found = seen(fault, code=code, said=[said])
        verdict.judge(fault, found)
        assert found.outcome == outcome


def test_a_lost_checkpoint_is_seen(tmp_path: Path):
    names = [f"step_{step:06d}" for step in range(1, runs.STEPS + 1)]
    note = {"step": 1, "optimizer": True, "model": {}, "files": {}}
    for name in names[1:]:
        folder = tmp_path / "checkpoints" / name
        folder.mkdir(parents=True)
        (folder / "progress.json").write_text(json.dumps(note))
    # Removed, as only so many are kept.
    assert verdict.lost(tmp_path, names[: runs.KEEP + 1]) == []
    os.remove(tmp_path / "checkpoints" / names[-1] / "progress.json")
    assert verdict.lost(tmp_path, names) == [names[-1]]
