"""Policy and engine in one process on a GPU: the gap of their log-probs, and what stays when the engine sleeps."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import gpu_numbers
import numpy as np
import parity
import torch

from megarl.train.memory import held_bytes

CYCLES = 50
PROMPTS, TOKENS = 16, 32
#: Twice what BF16 itself costs this model's log-probs (gpu_numbers.py, on the CPU: 0.04 nats).
GAP = 0.08
MIB, GIB = 1 << 20, 1 << 30


def held_while_asleep() -> int:
    """Bytes in use of the GPU while policy and engine are away: contexts, communicators, graphs, what was not given
    back. PyTorch counts a sleeping engine's tensors, which keep their addresses and have no memory."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return held_bytes()


def test_push_generate_sleep(world: Any, tmp_path: Path, figure) -> None:
    """Fifty times; log-probs of the first and the last are compared with the policy's."""
    from megarl.config.model_shape import read_model_shape
    from megarl.rollout.engine import Engine, Request, Sampling
    from megarl.weights.push import Push

    path = parity.write_model(tmp_path, "qwen2-untied", **gpu_numbers.SIZES)
    config = parity.run_config(
        path,
        precision="bf16",
        rollout={"max_tokens": TOKENS, "kv_cache_gib": 2.0, "max_concurrent": PROMPTS},
        data={"max_prompt_tokens": 32},
        batch={"tokens_per_microbatch": 1024, "logprob_chunk": 256},
    )
    engine = Engine(config, read_model_shape(path), eos_token_ids=(1,), rank=0, world_size=1)
    engine.sleep()
    prompts = [tuple(2 + (7 * i + j) % 90 for j in range(4 + i)) for i in range(PROMPTS)]
    gaps: list[float] = []
    held: list[int] = []
    pauses: list[float] = []
    with parity.policy_of(config, world) as policy:
        push = Push(policy, engine)
        for cycle in range(CYCLES):
            start = time.perf_counter()
            policy.offload_optimizers()
            engine.wake_weights()
            push.run()
            policy.offload_weights()
            engine.wake_cache()
            torch.cuda.synchronize()
            pauses.append(time.perf_counter() - start)
            requests = [Request(prompt, i, seed=i) for i, prompt in enumerate(prompts)]
            made = engine.generate(requests, Sampling(TOKENS))
            push.check()
            engine.sleep()
            held.append(held_while_asleep())
            policy.onload()
            if cycle in (0, CYCLES - 1):
                gaps.append(gap(policy, prompts, made))
    figure("gap of log-probs, policy and engine in BF16", max(gaps), "nats", f"< {GAP}")
    figure("pause of a push, tiny model", statistics.median(pauses), "s")
    figure("held while the engine sleeps", held[-1] / GIB, "GiB", "<= 2")
    figure(f"growth over {CYCLES} cycles", (held[-1] - held[1]) / MIB, "MiB", "< 50")
    assert max(gaps) < GAP
    assert held[-1] <= 2 * GIB
    assert held[-1] - held[1] < 50 * MIB


def gap(policy: Any, prompts: list[tuple[int, ...]], made: list[Any]) -> float:
    """Mean difference of the log-probs of what the engine has made."""
    sequences = [
        parity.Sequence(
            tokens=np.array([*prompt, *one.token_ids], np.int32),
            positions=parity.from_place(len(prompt), len(prompt) + len(one.token_ids)),
        )
        for prompt, one in zip(prompts, made, strict=True)
    ]
    found = policy.measure(sequences)
    theirs = np.concatenate([np.array(one.log_probs) for one in made])
    return float(np.abs(np.concatenate(found) - theirs).mean())
