"""A run whose judge goes away in the middle: it waits, stops with what it has, and continues when the judge is back."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import arithmetic_run
from ports import free_port


def judge(port: int, *limit: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, str(Path(__file__).with_name("judge_server.py")), str(port), *limit])
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return process
        time.sleep(0.05)
    raise TimeoutError("the judge did not start")


def lines(folder: Path) -> list[dict[str, Any]]:
    file = folder / "runs" / "run" / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_run_outlives_its_judge(tmp_path: Path) -> None:
    arithmetic_run.write_inputs(tmp_path)
    port = free_port()
    reward = {
        "kind": "judge",
        "judge": {"url": f"http://127.0.0.1:{port}/v1", "model": "judge", "patience": 2.0, "time_limit": 60.0},
    }
    arithmetic_run.write_run(tmp_path, steps=200, reward=reward)
    server = judge(port)
    run = arithmetic_run.start(tmp_path, "train", "run.yaml")
    try:
        deadline = time.monotonic() + 300
        while len(lines(tmp_path)) < 2:
            assert run.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        server.kill()
        server.wait()
    output = " ".join(run.communicate(timeout=300)[0].split())
    assert run.returncode == 2, output
    assert f"127.0.0.1:{port}" in output and "Traceback" not in output
    finished = len(lines(tmp_path))
    assert (tmp_path / "runs/run/checkpoints/latest").read_text().strip().endswith(str(finished))

    server = judge(port)
    try:
        steps = finished + 1
        arithmetic_run.finish(arithmetic_run.start(tmp_path, "train", "run.yaml", "resume=must", f"steps={steps}"))
    finally:
        server.kill()
        server.wait()
    metrics = lines(tmp_path)
    assert [line["step"] for line in metrics] == list(range(1, steps + 1))
    for line in metrics:
        # Each process begins with a question of its own, to see that the judge is there.
        asked = line["counters"]["judge_requests"] - line["counters"].get("judge_retries", 0)
        assert asked == 24 + (line["step"] in (1, steps))
        assert 0 < line["reward_mean"] < 1 and line["reward_std"] > 0


def test_evaluation_that_the_judge_left_is_made_on_resuming(tmp_path: Path) -> None:
    arithmetic_run.write_inputs(tmp_path)
    port = free_port()
    settings = {"url": f"http://127.0.0.1:{port}/v1", "model": "judge", "patience": 1.0, "concurrency": 1}
    changes = {"steps": 3, "reward": {"kind": "judge", "judge": settings}, "checkpoint": {"every": 3}}
    evaluation = {"path": "data/heldout.jsonl", "every": 1}
    arithmetic_run.write_run(tmp_path, **changes, evaluation=evaluation)
    # The first question, two steps of 24 answers, the first evaluation of 8, and half of the second.
    server = judge(port, str(1 + 24 + 8 + 24 + 4))
    run = arithmetic_run.start(tmp_path, "train", "run.yaml")
    output = run.communicate(timeout=300)[0]
    assert run.returncode == 2 and "Traceback" not in output, output
    server.wait(timeout=10)
    assert [("accuracy" in line, line["step"]) for line in lines(tmp_path)] == [(False, 1), (True, 1), (False, 2)]
    assert (tmp_path / "runs/run/checkpoints/latest").read_text().strip().endswith("2")

    server = judge(port)
    try:
        arithmetic_run.finish(arithmetic_run.start(tmp_path, "train", "run.yaml", "resume=must"))
    finally:
        server.kill()
        server.wait()
    found = [("accuracy" in line, line["step"]) for line in lines(tmp_path)]
    assert found == [(False, 1), (True, 1), (False, 2), (True, 2), (False, 3)]
