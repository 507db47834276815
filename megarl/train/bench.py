"""Measurements of a configuration: the phases of a step, and generation inside the loop beside plain vLLM."""

from __future__ import annotations

import statistics
import tempfile
import time
from typing import Any

from megarl.config.schema import RunConfig
from megarl.train.loop import run_step
from megarl.train.run import session_of

#: Steps that warm caches and allocators before anything is measured.
WARM_UP_STEPS = 1

#: What each phase's tokens/s counts: generated tokens, or all tokens of the sequences.
_GENERATING = ("generate", "score")


def bench_step(config: RunConfig) -> dict[str, Any]:
    """Run `config.steps` measured steps after the warm-up; medians over the steps.

    Returns `step_seconds`, `seconds` and `tokens_per_second` by phase, `tokens_generated`, `tokens_trained`,
    `padding_share`, `peak_memory_bytes` (largest process), `processes`, `steps`. Nothing is left in the runs folder.
    """
    with tempfile.TemporaryDirectory() as scratch, session_of(config.model_copy(update={"runs_dir": scratch})) as session:
        session.recorder.open(1)
        lines: list[dict[str, Any]] = []
        walls: list[float] = []
        for step in range(1, WARM_UP_STEPS + config.steps + 1):
            session.recorder.status(f"step {step} of {WARM_UP_STEPS + config.steps}")
            start = time.perf_counter()
            lines.append(run_step(session, step))
            walls.append(time.perf_counter() - start)
        return _report(lines[WARM_UP_STEPS:], walls[WARM_UP_STEPS:], session.world.size)


def _report(lines: list[dict[str, Any]], walls: list[float], processes: int) -> dict[str, Any]:
    phases = list(dict.fromkeys(name for line in lines for name in line["seconds"]))
    seconds = {name: statistics.median(line["seconds"].get(name, 0.0) for line in lines) for name in phases}
    generated = statistics.median(line.get("generated_tokens", 0) for line in lines)
    trained = statistics.median(line["tokens"] for line in lines)
    rates = {
        name: round((generated if name in _GENERATING else trained) / value, 1) for name, value in seconds.items() if value > 0
    }
    return {
        "step_seconds": round(statistics.median(walls), 4),
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
        "tokens_per_second": rates,
        "tokens_generated": generated,
        "tokens_trained": trained,
        "padding_share": round(statistics.median(line["padding_share"] for line in lines), 5),
        "peak_memory_bytes": max(line["peak_memory_bytes"] for line in lines),
        "processes": processes,
        "steps": len(lines),
    }
