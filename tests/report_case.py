"""Run folders for tests of the page, their lines made by what a run makes them with."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from tokenizer_case import Characters

from megarl.algorithms.base import Span
from megarl.records import Body, Head, Key, Prompt, Stretch
from megarl.train.clock import Interval
from megarl.train.inference import Traffic
from megarl.train.shown import row_of
from megarl.train.timeline import RankTimes, line_of

#: What no page may run, and what has no sign of its own.
HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"
CONTROLS = "bell\x07 escape\x1b[31m nothing\x00 turned \u202edrawkcab separator \u2028 <!-- & café 日本 😀"


#: A name of a level, which charts have.
LEVEL = "</script><script>window.hacked = 3</script>"


def write_run(folder: Path, steps: int = 12, **settings: Any) -> Path:
    """A run of so many steps, every fourth of which is evaluated; returns its folder."""
    folder.mkdir(parents=True)
    lines: list[dict[str, Any]] = []
    phases, samples = [], []
    for step in range(1, steps + 1):
        lines.append(step_line(step))
        phases.append(line_of(step, "step", [rank_times(rank, step) for rank in range(4)]))
        samples += [one for number in range(4) for one in sample_rows(step, number)]
        if step % 4 == 0:
            right = step / steps
            held_out = {"evaluation_problems": 8, "evaluation_problems_in_training_data": 0}
            lines.append({"step": step, "accuracy": right, "seconds": {"evaluate": 1.0}} | held_out)
            write_lines(folder / "evaluations" / f"step_{step:06d}.jsonl", answers(right))
    write_lines(folder / "metrics.jsonl", lines)
    write_lines(folder / "phases.jsonl", phases)
    write_lines(folder / "samples.jsonl", samples)
    given = {"name": folder.name, "rollout": {"thinking_end": "</think>", "max_tokens": 64}, "steps": steps} | settings
    (folder / "config.yaml").write_text(json.dumps(given))
    (folder / "preflight.json").write_text(json.dumps({"versions": {"torch": "2.13.0", "transformer-engine": None}}))
    return folder


def write_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def step_line(step: int) -> dict[str, Any]:
    rising = 1 - math.exp(-step / 5)
    return {
        "step": step,
        "algorithm": "grpo",
        "loss": 0.1 - 0.01 * rising,
        "reward_mean": rising,
        "entropy": None if step == 3 else 1.5 - rising,
        "logprob_gap_mean": 1e-7,
        "staleness_mean": 0.25,
        "tokens": 1000,
        "reward_mean_by_level": {"1": rising, LEVEL: rising / 3},
        "seconds": {"push": 0.5, "generate": 2.0, "update": 1.0},
        "memory_bytes": {"push": 1 << 30, "train": 2 << 30},
        "weight_push": {"pushes": 1, "bytes": 1 << 20, "most_bytes": 1 << 19},
    }


def rank_times(rank: int, step: int) -> RankTimes:
    intervals = [Interval("push", 0.0, 0.5), Interval("generate", 0.5, 2.0 + 0.1 * rank), Interval("update", 2.7, 1.0)]
    return RankTimes(intervals, {"push": 1 << 30, "train": (rank + 1) << 30}, Traffic(1, 1 << 20, step << 20, 0.25))


def sample_rows(step: int, number: int) -> list[dict[str, Any]]:
    """A sample of one turn, of several, with hostile texts, or that others go on from."""
    tokenizer = Characters()

    def row(text: str, spans: list[Span], stretches: tuple[Stretch, ...] = (), **more: Any) -> dict[str, Any]:
        ids = tuple(tokenizer.encode(text))
        key = Key(10 * step + (number == 3), 0, number, branch=more.pop("branch", ()))
        whole = stretches or (Stretch(0, len(ids), "policy", step - 1),)
        prompt = Prompt(key.prompt, (1,), f"What is {step}+{number}?", str(step + number), f"source {number % 2}")
        head = Head(key, 0, whole, reward=float(number % 2), **more)
        texts = tuple(text[one.start : one.end] for one in whole) if stretches else ()
        return row_of(tokenizer, step, prompt, head, Body(ids, text=text, texts=texts), spans)

    if number == 0:
        return [row("<think>step by step</think>It is 7.", [Span(0, 27, 1.5), Span(27, 35, -0.5)])]
    if number == 1:
        turns = (Stretch(0, 4, "policy", 0), Stretch(4, 8, "environment", 0), Stretch(8, 12, "policy", 0))
        return [row("ask>TOOLdone", [Span(0, 4, 0.25), Span(8, 12, -2.0)], turns)]
    if number == 2:
        return [row(HOSTILE + CONTROLS, [Span(0, 20)])]
    tree = [((), 0, -1.0), ((0,), 4, 1.0), ((0, 0), 6, 0.75), ((1,), 2, 0.0)]
    return [row("root and rest", [Span(fork, 13, value)], branch=one, fork=fork) for one, fork, value in tree]


def answers(right: float, problems: int = 8) -> list[dict[str, Any]]:
    """An evaluation's answers, of which the first are right."""
    return [
        {
            "prompt_index": number,
            "sample_index": 0,
            "by": "policy",
            "source": "arithmetic",
            "prompt": f"{number}+1=",
            "answer": str(number + 1),
            "response": f"<think>{number}</think>{number + 1}",
            "reward": float(number < right * problems),
            "right": number < right * problems,
            "length": 9,
            "finish_reason": "stop",
        }
        for number in range(problems)
    ]
