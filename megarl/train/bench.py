"""Measurements of a configuration: the phases of a step, and generation inside the loop beside plain vLLM."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from megarl.config.schema import RunConfig
from megarl.parallel.exchange import gather_all
from megarl.rollout.engine import Sampling
from megarl.rollout.plain import PlainEngine
from megarl.train.loop import run_step
from megarl.train.rollouts import make_rollouts
from megarl.train.run import session_of
from megarl.weights.push import Push

T = TypeVar("T")

#: Steps that warm caches and allocators before anything is measured.
WARM_UP_STEPS = 1

#: What each phase's tokens/s counts: generated tokens, or all tokens of the sequences.
_GENERATING = ("generate", "score")


def bench_step(config: RunConfig) -> dict[str, Any]:
    """Run `config.steps` measured steps after the warm-up; medians over the steps.

    Returns `step_seconds`, `seconds` and `tokens_per_second` by phase, `tokens_generated`, `tokens_trained`,
    `padding_share`, `peak_memory_bytes` (largest process), `processes`, `steps`. Nothing is left in the runs folder.
    """
    with (
        tempfile.TemporaryDirectory() as scratch,
        session_of(_recorded_in(scratch, config)) as session,
    ):
        session.recorder.open()
        lines: list[dict[str, Any]] = []
        walls: list[float] = []
        first = _warm_up(config)
        for step in range(1, first + config.steps + 1):
            start = time.perf_counter()
            lines.append(run_step(session, step))
            walls.append(time.perf_counter() - start)
        return _report(lines[first:], walls[first:], session.world.size)


def _report(lines: list[dict[str, Any]], walls: list[float], processes: int) -> dict[str, Any]:
    phases = list(dict.fromkeys(name for line in lines for name in line["seconds"]))
    seconds = {name: statistics.median(line["seconds"].get(name, 0.0) for line in lines) for name in phases}
    generated = statistics.median(line.get("generated_tokens", 0) for line in lines)
    trained = statistics.median(line["tokens"] for line in lines)
    rates = {
        name: round((generated if name in _GENERATING else trained) / value, 1)
        for name, value in seconds.items()
        if value > 0
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


def bench_rollout(config: RunConfig) -> dict[str, Any]:
    """Generation inside the loop beside plain vLLM, in turns, `config.steps` times.

    Plain vLLM is `LLM.generate` with the same engine arguments, weights and prompts in the same processes, without
    seeds of the samples' own, log-probs of the chosen tokens included. The loop's seconds are those of the whole
    rollout stage: drawing work, generating, decoding, grading and exchanging metadata. Tokens/s are those of all
    replicas together. Both engines are awake at once.

    Returns both speeds, their ratio turn by turn (`ratios`) and its median (`ratio`).
    """
    with (
        tempfile.TemporaryDirectory() as scratch,
        session_of(_recorded_in(scratch, config)) as session,
    ):
        session.recorder.open()
        engine = session.inference.running_engine
        plain = PlainEngine(config, session.policy.shape)
        Push(session.policy, plain).run()
        sampling = Sampling(
            max_tokens=config.rollout.max_tokens,
            temperature=config.rollout.temperature,
            top_p=config.rollout.top_p,
            top_k=config.rollout.top_k,
            stop_token_ids=(*engine.eos_token_ids, *config.rollout.stop_token_ids),
        )
        # The push above needs the policy's weights, which leave the device when the loop's engine wakes.
        session.inference.wake()
        turns: list[dict[str, float]] = []
        for step in range(1, WARM_UP_STEPS + config.steps + 1):
            session.recorder.status(f"turn {step} of {WARM_UP_STEPS + config.steps}")
            plan = session.algorithm.plan(step)
            loop_seconds, rollouts = _together(lambda plan=plan, step=step: make_rollouts(session, plan, step))
            prompts = [prompt.token_ids for prompt, _ in rollouts.made.answers]
            share = prompts[engine.replica :: engine.num_replicas]
            plain_seconds, made = _together(lambda share=share: plain.generate(share, sampling))
            tokens = sum(rollouts.made.generated_tokens.values())
            turns.append(
                {"loop": tokens / loop_seconds, "plain": sum(gather_all(made if engine.speaks else 0)) / plain_seconds}
            )
        session.inference.sleep()
        measured = turns[WARM_UP_STEPS:]
        ratios = [turn["loop"] / turn["plain"] for turn in measured]
        return {
            "loop_tokens_per_second": round(statistics.median(turn["loop"] for turn in measured), 1),
            "plain_tokens_per_second": round(statistics.median(turn["plain"] for turn in measured), 1),
            "ratio": round(statistics.median(ratios), 4),
            "ratios": [round(ratio, 4) for ratio in ratios],
            "requests": config.batch.prompts * config.rollout.group_size,
            "processes": session.world.size,
        }


def _recorded_in(folder: str, config: RunConfig) -> RunConfig:
    """The configuration of a measurement: recorded in `folder` alone, and with the steps of the warm-up too."""
    logging = config.logging.model_copy(update={"wandb": None})
    # The last step of a run that is ahead of its learning asks nothing, as no measured one should.
    steps = _warm_up(config) + config.steps + config.rollout.ahead
    return config.model_copy(update={"runs_dir": folder, "logging": logging, "steps": steps})


def _warm_up(config: RunConfig) -> int:
    """Steps before the measured ones, of which at least one has learned."""
    return WARM_UP_STEPS + config.rollout.ahead


def _together(work: Callable[[], T]) -> tuple[float, T]:
    """Seconds until the slowest rank has done `work`, and this rank's result."""
    dist.barrier()
    start = time.perf_counter()
    result = work()
    dist.barrier()
    return time.perf_counter() - start, result
