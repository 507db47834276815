"""What leaves the device comes back bit for bit, in memory that is allocated once; and memory that grows is told.

On the CPU, by the code that runs on a GPU.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import parity
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: By name: the model, and what its configuration says beside.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "fp32": ("qwen2-tied", {"precision": "fp32"}),
    "bf16 mixture": ("qwen3-moe", {"precision": "bf16"}),
    "adapter": ("qwen2-tied", {"precision": "bf16", "parameters": "adapter", "adapter": {"rank": 4}}),
}


#: Operations whose results have memory of their own.
MAKES = (torch.ops.aten.empty.memory_format, torch.ops.aten._to_copy.default, torch.ops.aten.clone.default)


class Seen(TorchDispatchMode):
    """`new`: bytes of tensors that are made inside; `copied`: bytes that are copied."""

    def __init__(self) -> None:
        super().__init__()
        self.new = self.copied = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.copy_.default:
            self.copied += args[0].nbytes
        elif func in MAKES:
            self.new += sum(leaf.nbytes for leaf in tree_leaves(found))
        return found


def go_away_and_come_back(world: Any, folder: Path) -> dict[str, Any]:
    """Of each case: what two updates made with and without a way to host memory and back between them, and what was
    seen of the way. A scenario of `run_world`."""
    found = {}
    for name, (model, sections) in CASES.items():
        config, made = parity.run_config(folder / model, **sections), []
        for moves in (False, True):
            with parity.policy_of(config, world) as policy:
                made.append(two_updates(policy, config, moves=moves))
                if moves:
                    found[name] = *made, ways(policy)
    return found


def two_updates(policy: Any, config: Any, *, moves: bool) -> list[bytes]:
    """The bits of weights, fp32 weights and moments after two updates."""
    residence = residence_of(policy)
    for seed in range(2):
        batch = parity.mini_batch(seed)
        old = [np.full(one.trained, -4.5) for one in batch]
        parity.update(policy, parity.grpo(config), parity.with_old_log_probs(batch, old, seed))
        if moves and seed == 0:
            residence.offload_optimizer()
            residence.offload_weights()
            residence.onload()
            residence.wait_for_state()
    return [one.detach().clone().view(torch.uint8).numpy().tobytes() for one in kept(policy)]


def kept(policy: Any) -> list[torch.Tensor]:
    """Weights, and the optimizer's own tensors."""
    trained = policy.trained["policy"]
    tensors = [*policy.network.computes_with()]
    for one in trained.optimizer.chained_optimizers:
        groups = [parameter for group in one.optimizer.param_groups for parameter in group["params"]]
        tensors += [*groups, *(value for state in one.optimizer.state.values() for value in state.values())]
    return [tensor.reshape(-1) for tensor in tensors]


def residence_of(policy: Any) -> Any:
    """What a GPU's policy has."""
    from megarl.policy.residence import Residence

    trained = policy.trained["policy"]
    frozen = policy.chunks if policy.network.base_is_frozen else ()
    return Residence(trained.wrapped, trained.optimizer, frozen, moves=True)


def ways(policy: Any) -> dict[str, Any]:
    """What is seen of two ways and back, in bytes, and what stays on the device on the way."""
    residence, trained = residence_of(policy), policy.trained["policy"]
    buffers = [one for chunk in trained.wrapped for one in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    weights = {one.untyped_storage().data_ptr(): one.untyped_storage() for one in policy.network.computes_with()}
    own = {one.untyped_storage().data_ptr(): one.untyped_storage() for one in kept(policy)}
    gradients = [one.grad_data.untyped_storage() for one in buffers]
    found: dict[str, Any] = {"weights": size(weights.values()), "all": size(own.values())}
    found["gradients"] = size(gradients)
    for number in range(2):
        before = [tensor.clone() for tensor in kept(policy)]
        with Seen() as away:
            residence.offload_optimizer()
            found["while pushing"] = size(own.values()), size(gradients)
            residence.offload_weights()
            found["while generating"] = size(own.values()), size(gradients)
            residence.offload_weights()
        with Seen() as back:
            residence.onload_weights()
            found["again for a push"] = size(own.values())
            residence.onload()
            residence.onload()
            residence.wait_for_state()
        found[f"way {number}"] = away.new, away.copied, back.new, back.copied
        same = [torch.equal(one, other) for one, other in zip(before, kept(policy), strict=True)]
        found[f"way {number} is bitwise"] = all(same) and len(same) > 10
    found["back"] = size(own.values()), size(gradients)
    return found


def grow(world: Any) -> list[tuple[dict[str, Any], str | None]]:
    """What a watch says of each of 130 steps, in which the last rank keeps 2 MiB more at the end of each of the first
    60. A scenario of `run_world`."""
    from megarl.train.memory import MemoryWatch

    watch, kept, found = MemoryWatch(50.0, watches=True), [], []
    for step in range(130):
        if step < 60 and world.rank == world.size - 1:
            kept.append(torch.ones(1 << 19))
        watch.note("asleep")
        found.append(watch.take())
    return found


def size(storages: Any) -> int:
    return sum(one.nbytes() for one in storages)


def test_nothing_is_lost_and_nothing_allocated_twice(tmp_path: Path):
    for model in {model for model, _ in CASES.values()}:
        parity.write_model(tmp_path, model)
    for found in parity.run_world(__name__, "go_away_and_come_back", 2, tmp_path):
        for name, (stayed, moved, seen) in found.items():
            assert stayed == moved, name
            weights, everything, gradients = seen["weights"], seen["all"], seen["gradients"]
            assert gradients > 0 and (everything > 1.9 * weights or name == "adapter")
            assert seen["while pushing"] == (weights, 0) and seen["while generating"] == (0, 0)
            assert seen["again for a push"] == weights and seen["back"] == (everything, gradients)
            assert seen["way 0 is bitwise"] and seen["way 1 is bitwise"]
            # Host memory for all of it, once; then none. Frozen weights are copied out once.
            new, out, _, back = seen["way 0"]
            assert everything <= new < 1.5 * everything + 100_000 and out == back == everything
            constant = weights - (gradients // 2 if name == "adapter" else weights)
            assert seen["way 1"] == (0, everything - constant, 0, everything)


def test_memory_that_grows_is_told_once_it_has():
    first, second = parity.run_world(__name__, "grow", 2)
    assert first == second
    told = {step: sentence for step, (_, sentence) in enumerate(first) if sentence is not None}
    assert re.fullmatch(r"memory at the end of each phase, in GiB: asleep .*, train .*", told[0])
    # 50 steps and 5 after the first 5, and not again: what came later is less.
    assert list(told) == [0, 59]
    assert re.match(
        r"warning: memory has grown by (9\d|10\d) MiB in 50 steps, more than health.memory_growth_mib=50; ", told[59]
    )
    assert first[-1][0].keys() == {"peak_memory_bytes", "memory_bytes"}
    assert first[59][0]["memory_bytes"]["asleep"] - first[9][0]["memory_bytes"]["asleep"] > 95 << 20
