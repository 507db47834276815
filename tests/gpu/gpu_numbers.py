"""The numbers of a policy's update, on the GPU or, `python gpu_numbers.py MODEL OUT`, on the CPU for all precisions."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import parity
import torch

from megarl.config.fp8 import DELAYED
from megarl.config.sections import RunSettings

#: Sizes of which every product may be FP8 in blocks, with heads that attention on GPUs takes.
SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "head_dim": 64,
    "num_hidden_layers": 3,
}
MODELS = {"qwen2-untied": SIZES, "qwen3-moe": SIZES | {"moe_intermediate_size": 256}}
PRECISIONS = tuple(one for one in get_args(RunSettings.model_fields["precision"].annotation) if one != "fp32")


def config_of(path: Path, precision: str) -> Any:
    # fp32 has no attention kernel for packed sequences on a GPU; here it is computed on the CPU alone.
    # Delayed scaling goes on with every micro-batch there, and with every step here: one holds the whole mini-batch.
    batch = {"tokens_per_microbatch": 1024 if precision == DELAYED else 256, "logprob_chunk": 64}
    return parity.run_config(path, precision=precision, batch=batch, optimizer={"warmup_steps": 1})


def numbers(path: Path, precision: str, world: Any) -> dict[str, Any]:
    """Log-probs (T,) by sequence, before and after an update, with its loss and gradient norm.

    Another update comes first, which changes no weight: delayed scaling begins with factors of 1, of which little can
    be told, and goes on with those that this one's numbers ask for.
    """
    config = config_of(path, precision)
    with parity.policy_of(config, world) as policy:
        batch = parity.mini_batch(0)
        parity.update(policy, parity.grpo(config), parity.with_old_log_probs(batch, policy.measure(batch), 0))
        before = policy.measure(batch)
        result = parity.update(policy, parity.grpo(config), parity.with_old_log_probs(batch, before, 0))
        after = policy.measure(batch)
    return {
        "before": np.concatenate(before),
        "after": np.concatenate(after),
        "loss": result.loss,
        "grad_norm": result.grad_norm,
    }


def gradients_of_passes(policy: Any, config: Any, passes: Sequence[tuple[int, ...]]) -> dict[str, list[torch.Tensor]]:
    """What the buffers hold of every parameter after each of `passes`, one mini-batch after the other, which are named
    by their seeds; none is applied."""
    batches = [parity.mini_batch(seed) for seed in range(1 + max(map(max, passes)))]
    likely = [[np.full(one.trained, -np.log(97), np.float32) for one in batch] for batch in batches]
    batches = [parity.with_old_log_probs(batch, old, seed=0) for batch, old in zip(batches, likely, strict=True)]
    found: dict[str, list[torch.Tensor]] = {}
    for seeds in passes:
        for seed in seeds:
            objectives = parity.grpo(config).objectives
            policy.accumulate(batches[seed], objectives, parity.totals(batches[seed]), old_is_current=False)
        for name, parameter in policy.named_parameters():
            found.setdefault(name, []).append(parameter.main_grad.clone())
        policy.discard()
    return found


def main() -> None:
    """Write what the CPU's layers compute of the models in a folder, by model and precision."""
    # Its Adam, which Megatron-core takes where it is installed, is for GPUs alone.
    sys.modules["transformer_engine"] = None  # type: ignore[assignment]
    from megarl.parallel import bootstrap

    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    world = bootstrap.join()
    found = {(name, one): numbers(folder / name, one, world) for name in MODELS for one in ("fp32", *PRECISIONS)}
    out.write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    main()
