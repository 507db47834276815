"""Measure a step of configs/bench_step.yaml beside TRL's GRPOTrainer on the same work, in turns.

    python -m venv peer && peer/bin/pip install "trl==1.16.*" "torch==2.13.0"
    python tools/measure_peer.py --peer peer/bin/python --data data/bench --turns 5

Make the inputs first, as configs/bench_step.yaml says. Each turn starts both, one after the other, with
as many threads in all; the first step of each, which warms up, is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, required=True, help="Python of an environment with TRL")
    parser.add_argument("--data", type=Path, default=Path("data/bench"))
    parser.add_argument("--processes", type=int, default=1, help="megarl's processes; TRL has one")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="measured steps of each turn")
    arguments = parser.parse_args()
    threads = len(os.sched_getaffinity(0))
    turns = []
    for turn in range(1, arguments.turns + 1):
        ours, theirs = megarl_step(arguments), peer_step(arguments, threads)
        turns.append({"megarl": ours, "trl": theirs, "ratio": round(ours["step"] / theirs["step"], 3)})
        print(f"turn {turn} of {arguments.turns}: {json.dumps(turns[-1])}", file=sys.stderr, flush=True)
    ratios = [turn["ratio"] for turn in turns]
    print(json.dumps({"ratio": round(statistics.median(ratios), 3), "ratios": ratios, "turns": turns}))


def megarl_step(arguments: argparse.Namespace) -> dict[str, float]:
    """Median seconds of a step, its generation and its update, by `megarl bench step`."""
    table = [f"parallel.processes={arguments.processes}", f"steps={arguments.steps}"]
    table += [f"model.path={arguments.data}/model", f"data.path={arguments.data}/arithmetic/train.jsonl"]
    command = [sys.executable, "-m", "megarl", "bench", "step", str(ROOT / "configs/bench_step.yaml"), "--json", *table]
    found = last_line(command)
    return {"step": found["step_seconds"], "generation": found["seconds"]["generate"]}


def peer_step(arguments: argparse.Namespace, threads: int) -> dict[str, float]:
    """The same of TRL's trainer."""
    with tempfile.TemporaryDirectory() as out:
        command = [str(arguments.peer), str(ROOT / "tools/peers/trl_step.py"), "--data", str(arguments.data)]
        command += ["--out", out, "--threads", str(threads), "--steps", str(arguments.steps + 1)]
        found = last_line(command)
    return {name: round(statistics.median(found[key][1:]), 4) for name, key in (("step", "steps"), ("generation",) * 2)}


def last_line(command: list[str]) -> Any:
    """The JSON that a command prints last. Ends this program where the command fails, with what it said."""
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
    if done.returncode:
        sys.exit(f"measure_peer: {' '.join(command[:4])} ... ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
