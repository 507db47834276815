"""Who holds a run up: the judgement over what ranks say, and where a thread stands."""

from __future__ import annotations

import errno
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megarl.health import stacks
from megarl.health.guard import disk_is_full
from megarl.health.judgement import Beat, Seen, judge
from megarl.parallel.progress import Progress

WORKS = Beat(0, "n1", 100, 7, "generate", 12, idle=1.0, limit=60.0, waits_in=None, at="megarl/rollout/engine.py:1 _run")
WAITS = replace(WORKS, waits_in="all_gather_object", at="megarl/parallel/exchange.py:9 gather_all")


def world(*beats: Beat, **seen: dict[str, Any]) -> list[Seen]:
    """Four ranks, two on each host; `seen` by r0, r1, ... says how they look from outside."""
    hosts = ("n1", "n1", "n2", "n2")
    ranks = [replace(beat, rank=rank, host=hosts[rank], pid=100 + rank) for rank, beat in enumerate(beats)]
    return [Seen(beat, **seen.get(f"r{beat.rank}", {})) for beat in ranks]


def test_a_run_that_works_has_nobody_to_blame():
    assert judge(world(WORKS, WAITS, WORKS, WAITS), 30.0) is None
    long_wait = replace(WAITS, idle=5000.0)
    assert judge(world(WORKS, long_wait, long_wait, long_wait), 30.0) is None
    assert judge(world(*[replace(WAITS, idle=59.0)] * 4), 30.0) is None


def test_the_one_that_stands_still_is_named_with_its_phase_limit_and_place():
    stuck = replace(WORKS, phase="score", idle=61.0, at="megarl/rewards/grader.py:5 grade")
    verdict = judge(world(WAITS, replace(WAITS, idle=70.0), WAITS, stuck), 30.0)
    assert verdict is not None and verdict.cause == "stuck"
    assert verdict.sentence() == (
        "rank 3 on n2 made no progress for 61 s in phase score (limit 60 s, health.limits.score), at "
        "megarl/rewards/grader.py:5 grade; "
        "rank 0 waits in all_gather_object at megarl/parallel/exchange.py:9 gather_all"
    )


def test_of_several_that_stand_still_those_behind_are_named():
    """As where all wait for a GPU: no stack says which of them waits for the others."""
    ahead, behind = replace(WORKS, idle=70.0, number=13), replace(WORKS, idle=70.0, number=12)
    verdict = judge(world(ahead, behind, ahead, behind), 30.0)
    assert verdict is not None and [beat.rank for beat in verdict.culprits] == [1, 3]
    assert verdict.sentence().startswith("rank 1 on n1 and rank 3 on n2 made no progress for 70 s in phase generate")


def test_silence_and_death_go_before_slowness():
    slow = replace(WORKS, idle=100.0)
    seen = world(slow, WAITS, WAITS, WAITS, r2={"silent": 31.0})
    verdict = judge(seen, 30.0)
    assert verdict is not None and verdict.sentence().startswith(
        "rank 2 on n2 gave no sign of life for 31 s (health.silence) in phase generate, last seen in all_gather_object"
    )
    verdict = judge([*seen[:3], Seen(seen[3].beat, dead=True)], 30.0)
    assert verdict is not None and verdict.sentence().startswith("rank 3 on n2 has died in phase generate")
    assert judge(world(WORKS, WAITS, WAITS, WAITS, r2={"silent": 29.0}), 30.0) is None


def test_who_left_by_itself_is_neither_dead_nor_silent():
    left = replace(WAITS, left=True)
    assert judge(world(WORKS, left, left, WORKS, r1={"silent": 99.0}, r2={"dead": True}), 30.0) is None


def test_all_that_wait_for_each_other_for_too_long_are_a_deadlock():
    late = replace(WAITS, idle=61.0)
    verdict = judge(world(late, late, replace(late, number=11, phase="push", waits_in="recv"), late), 30.0)
    assert verdict is not None and verdict.cause == "deadlock"
    assert verdict.sentence().startswith("all ranks wait for each other in phase push; rank 2 on n2 in recv at megarl/")


def test_while_one_is_silent_the_others_that_wait_are_no_deadlock():
    """It was last seen waiting, as they are, and was stopped since."""
    late = replace(WAITS, idle=61.0)
    assert judge(world(late, late, late, late, r1={"silent": 5.0}), 30.0) is None
    verdict = judge(world(late, late, late, late, r1={"silent": 31.0}), 30.0)
    assert verdict is not None and verdict.cause == "silent" and [beat.rank for beat in verdict.culprits] == [1]


def test_many_are_not_all_listed():
    beats = [replace(WORKS, rank=rank, host=f"n{rank // 10}", idle=99.0) for rank in range(100)]
    verdict = judge([Seen(beat) for beat in beats], 30.0)
    assert verdict is not None
    assert verdict.sentence().startswith("ranks 0, 1, 2, 3, 4, 5, 6, 7, ... on n0 and ranks 10, 11, ")
    assert " on n3 and more made no progress" in verdict.sentence()


def standing_in(*calls: tuple[str, str]) -> stacks.Stand:
    """Where a thread stands that went through functions of these files and names, outermost first, and sleeps now."""
    inner: Callable[[], object] = time.time
    entered = threading.Event()
    for place, (file, name) in enumerate(reversed(calls)):
        first = "entered.set(); sleep(20)" if place == 0 else "inner()"
        scope: dict[str, Any] = {"inner": inner, "entered": entered, "sleep": time.sleep}
        exec(compile(f"def {name}():\n    {first}\n", f"/site/{file}", "exec"), scope)
        inner = scope[name]
    thread = threading.Thread(target=inner, daemon=True)
    thread.start()
    assert entered.wait(5)
    time.sleep(0.05)
    return stacks.stand_of(sys._current_frames()[thread.ident or 0])


LOOP = ("megarl/train/loop.py", "run_step")


@pytest.mark.parametrize(
    "calls, waits_in, at",
    [
        (
            [
                LOOP,
                ("megarl/parallel/exchange.py", "gather_all"),
                ("torch/distributed/c10d_logger.py", "wrapper"),
                ("torch/distributed/distributed_c10d.py", "all_gather_object"),
                ("torch/distributed/c10d_logger.py", "wrapper"),
                ("torch/distributed/distributed_c10d.py", "all_gather"),
            ],
            "all_gather_object",
            "megarl/train/loop.py:2 run_step",
        ),
        ([LOOP, ("megatron/core/transformer/mlp.py", "forward"), ("torch/nn/functional.py", "linear")], None, LOOP[1]),
        (
            [
                LOOP,
                ("vllm/model_executor/layers/linear.py", "forward"),
                ("vllm/distributed/communication_op.py", "tensor_model_parallel_all_reduce"),
                ("vllm/distributed/device_communicators/cpu_communicator.py", "all_reduce"),
                ("torch/_ops.py", "__call__"),
            ],
            "tensor_model_parallel_all_reduce",
            LOOP[1],
        ),
        (
            [("megarl/policy/policy.py", "update"), ("megatron/core/pipeline_parallel/p2p_communication.py", "recv")],
            "recv",
            "megarl/policy/policy.py:2 update",
        ),
        ([LOOP, ("user/reward.py", "forever")], None, LOOP[1]),
        ([("user/program.py", "run"), ("user/reward.py", "forever")], None, "user/reward.py:2 forever"),
    ],
)
def test_a_collective_is_told_from_work(calls: list[tuple[str, str]], waits_in: str | None, at: str):
    found = standing_in(*calls)
    assert found.waits_in == waits_in
    assert found.at.endswith(at)


def test_a_dump_has_every_thread(tmp_path):
    stacks.dump(tmp_path / "hang" / "rank_0003.txt", "rank 3 on n1: phase push")
    text = (tmp_path / "hang" / "rank_0003.txt").read_text()
    assert text.startswith("rank 3 on n1: phase push\n\n") and "test_a_dump_has_every_thread" in text


def test_progress_remembers_the_longest_pause_of_each_phase(monkeypatch: pytest.MonkeyPatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    entered: list[str] = []
    progress = Progress()
    progress.on_enter = lambda: entered.append(progress.phase)
    progress.enter("generate")
    for pause in (2.0, 5.0, 1.0):
        now[0] += pause
        progress.tick()
    assert "generate" not in progress.longest
    now[0] += 3.0
    progress.enter("update")
    assert progress.longest == {"start": 0.0, "generate": 5.0} and progress.number == 2
    now[0] += 1.0
    progress.enter("generate")
    now[0] += 4.0
    progress.enter("update")
    assert progress.longest["generate"] == 5.0 and entered == ["generate", "update", "generate", "update"]


def test_a_full_disk_is_known_by_what_led_to_the_error(tmp_path: Path):
    """Torch says `unexpected pos` while it handles the system's error."""
    try:
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            raise RuntimeError("unexpected pos 704 vs 598")  # noqa: B904 (as torch does)
    except RuntimeError as error:
        refusal = disk_is_full(error, tmp_path)
    assert refusal is not None and os.strerror(errno.ENOSPC) in str(refusal)
    assert disk_is_full(RuntimeError("unexpected pos 704 vs 598"), tmp_path) is None
