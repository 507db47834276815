"""Between pipeline stages: micro-batches of one length give the same numbers, and no message has to say its length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import parity
import pytest

#: Of 4 processes, by model.
LAYOUTS: list[tuple[str, dict[str, Any]]] = [
    ("qwen2-tied", {"pipeline": 2, "context": 2}),
    ("qwen3-moe", {"pipeline": 2, "tensor": 2, "sequence": True, "expert": 2, "expert_tensor": 1}),
    ("qwen3-untied", {"pipeline": 2, "virtual_pipeline": 2}),
]


def both_ways(world: Any, folder: Path) -> list[list[dict[str, Any]]]:
    """Of each layout: an update and log-probs with micro-batches of their own lengths, as on the CPU, and of one, as on
    a GPU. A scenario of `run_world`."""
    found = []
    for model, parallel in LAYOUTS:
        config = parity.run_config(folder / model, parallel=parallel, batch={"tokens_per_microbatch": 96})
        ways = []
        for one_length in (False, True):
            with parity.policy_of(config, world) as policy:
                policy.network.megatron_config.variable_seq_lengths = not one_length
                ways.append(numbers_of(policy, config))
        found.append(ways)
    return found


def numbers_of(policy: Any, config: Any) -> dict[str, Any]:
    """What the update says, log-probs after it, and how many messages said their shapes."""
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    asked, original = [], P2PCommunicator._communicate_shapes

    def counted(self: Any, *args: Any) -> Any:
        asked.append(args)
        return original(self, *args)

    communicator: Any = P2PCommunicator
    communicator._communicate_shapes = counted
    try:
        batch = parity.mini_batch(3)
        old = [np.full(one.trained, -4.5) for one in batch]
        update = parity.update(policy, parity.grpo(config), parity.with_old_log_probs(batch, old, 3))
        mine = [batch[i] for i in parity.share(batch, policy.grid)]
        log_probs = policy.measure(mine)
    finally:
        communicator._communicate_shapes = original
    return {
        "loss": update.loss,
        "norm": update.grad_norm,
        "padding": 1 - update.real_tokens / update.computed_tokens,
        "log_probs": None if log_probs is None else np.concatenate(log_probs),
        "asked": len(asked),
    }


def test_messages_of_one_length_say_nothing_and_change_nothing(tmp_path: Path):
    for model, _ in LAYOUTS:
        parity.write_model(tmp_path, model)
    for found in parity.run_world(__name__, "both_ways", 4, tmp_path):
        for own, same in found:
            assert own["asked"] > 5 and same["asked"] == 0
            assert same["padding"] > own["padding"]
            assert same["loss"] == pytest.approx(own["loss"], rel=1e-6)
            assert same["norm"] == pytest.approx(own["norm"], rel=1e-5)
            if own["log_probs"] is not None:
                np.testing.assert_allclose(same["log_probs"], own["log_probs"], rtol=0, atol=2e-6)
