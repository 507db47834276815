"""Measure generation with an environment that takes its time, beside the same with one that does not.

CONFIG gives the engine: model, rollout.tensor, rollout.max_concurrent, parallel.processes. --samples samples of --turns
turns of --tokens tokens each are generated, with calls that return at once and with calls that take --delay seconds, in
turns, --rounds times. Prints tokens/s of both and their ratio; the weights are those of model.path.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from megarl.config.environments import EnvironmentSettings
from megarl.config.load import load_config
from megarl.config.model_shape import read_model_shape
from megarl.config.schema import RunConfig
from megarl.environments.base import Reply
from megarl.parallel.launch import launch
from megarl.records import Prompt

EXAMPLES = """examples:
  python tools/measure_turns.py configs/quickstart.yaml --delay 0.2
  python tools/measure_turns.py configs/quickstart.yaml --processes 1 --tensor 1 --samples 512 --rounds 3
"""


class Waits:
    """An environment that takes `delay` seconds for each of its `turns`."""

    TOKENS = True

    def __init__(self, delay: float, turns: int) -> None:
        self._delay, self._left = delay, turns

    def start(self, prompt: Prompt) -> None: ...

    def turn(self, said: list[int]) -> Reply:
        time.sleep(self._delay)
        self._left -= 1
        return Reply([5, 6, 7, 8] if self._left else None, 0.0)


def measure(config: RunConfig, options: dict[str, Any]) -> list[list[dict[str, float]]]:
    """Of each rank: seconds and tokens of its replica by delay, for every round."""
    import torch.distributed as dist

    from megarl.data.tokenizer import load_tokenizer
    from megarl.environments import host as hosts
    from megarl.parallel import bootstrap
    from megarl.parallel.exchange import gather_all
    from megarl.rollout.engine import Engine, Sampling
    from megarl.rollout.play import Bounds, Task, play

    world = bootstrap.join()
    shape = read_model_shape(config.model.path)
    tokenizer = load_tokenizer(config.model.tokenizer or config.model.path)
    # Nothing ends an answer but its bound, so that both do the same work.
    engine = Engine(config, shape, eos_token_ids=[], rank=world.rank, world_size=world.size, load_weights=True)
    turns, tokens = options["turns"], options["tokens"]
    prompt = tuple(tokenizer.encode("1 + 2 + 3 = "))
    tasks = [Task(index, Prompt(index, prompt, "", ""), index, index) for index in range(options["samples"])]
    bounds = Bounds(turns, turns * (tokens + 4) + 1, 10_000, tokens, options["workers"])
    sampling = Sampling(max_tokens=bounds.tokens)
    found: list[dict[str, float]] = []
    for number in range(options["rounds"] + 1):
        for delay in (0.0, options["delay"]):
            arguments = {"delay": delay, "turns": turns}
            settings = EnvironmentSettings(kind=f"{Path(__file__).resolve()}:Waits", arguments=arguments)
            host = hosts.build(settings, tokenizer) if engine.speaks else None
            dist.barrier()
            start = time.perf_counter()
            played = play(engine, tasks, sampling, bounds, host, engine.fixed_assignment(len(tasks)))
            seconds = time.perf_counter() - start
            if host is not None:
                host.close()
            if number:  # the first round warms caches
                made = sum(len(one.token_ids) - 4 * (len(one.turns) - 1) for one in played)
                found.append({"delay": delay, "seconds": seconds, "tokens": made if engine.speaks else 0})
    everywhere = gather_all(found)
    engine.close()
    bootstrap.leave()
    return everywhere


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, metavar="CONFIG")
    parser.add_argument("--delay", type=float, default=0.2, help="seconds of each call (default: 0.2)")
    parser.add_argument("--samples", type=int, default=512, help="samples (default: 512)")
    parser.add_argument("--turns", type=int, default=3, help="turns of each (default: 3)")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of each turn (default: 32)")
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds (default: 3)")
    parser.add_argument("--workers", type=int, default=256, help="rollout.environment.workers (default: 256)")
    parser.add_argument("--processes", type=int, help="processes (default: those of CONFIG)")
    parser.add_argument("--tensor", type=int, help="tensor-parallel size of an engine (default: that of CONFIG)")
    options = parser.parse_args(arguments)
    processes = options.processes
    overrides = [] if processes is None else [f"parallel.processes={processes}", "parallel.tensor=1"]
    overrides += [] if options.tensor is None else [f"rollout.tensor={options.tensor}"]
    config = load_config(options.config, overrides)
    ranks = launch(measure, (config, vars(options)), config.parallel.processes or 1)
    rates: dict[float, list[float]] = {}
    for turn in zip(*ranks, strict=True):
        seconds = max(one["seconds"] for one in turn)
        rates.setdefault(turn[0]["delay"], []).append(sum(one["tokens"] for one in turn) / seconds)
    without, late = rates[0.0], rates[options.delay]
    ratios = [b / a for a, b in zip(without, late, strict=True)]
    report = {
        "tokens_per_second": round(statistics.median(without), 1),
        "tokens_per_second_delayed": round(statistics.median(late), 1),
        "delay": options.delay,
        "ratios": [round(ratio, 3) for ratio in ratios],
        "ratio": round(statistics.median(ratios), 3),
    }
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
