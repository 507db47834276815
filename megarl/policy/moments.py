"""Whether Adam's moments came back: a digest of them that does not depend on the layout.

What a framework loses without a word when it resumes is the optimizer's state; training goes on, only worse.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared

from megarl.ops.bits import sum_of_bits

#: Megatron's names of the moments.
KINDS = ("exp_avg", "exp_avg_sq")


def digest(optimizer: Any) -> dict[str, str]:
    """Of each moment the sum of its bits over the whole model, in hexadecimal, the same under every layout. Collective.

    `optimizer` is Megatron's chain of distributed optimizers. Copies that ranks share count once; padding of the
    vocabulary is zero and adds nothing.
    """
    sums: Counter[str] = Counter()
    for distributed in optimizer.chained_optimizers:
        for parameter in distributed.model_param_group_index_map:
            if not (param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(parameter)):
                continue
            state = distributed._get_main_param_and_optimizer_states(parameter)
            for kind in KINDS:
                if kind in state:
                    sums[kind] += sum_of_bits(state[kind])
    # Sums wrap around in 64 bits, alike in any order.
    total = torch.tensor([_wrapped(sums[kind]) for kind in KINDS], dtype=torch.int64)
    dist.all_reduce(total)
    return {kind: f"{value & (1 << 64) - 1:016x}" for kind, value in zip(KINDS, total.tolist(), strict=True)}


def _wrapped(value: int) -> int:
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)
