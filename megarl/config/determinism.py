"""What makes a run on a GPU repeat to the last bit: `deterministic: true`. Torch-free.

On the CPU every run does. On a GPU gradients of attention and embeddings are added up in the order in which threads
come, and libraries choose among algorithms by what is free; each reads its variable here once, when it starts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

from megarl.config.schema import RunConfig
from megarl.errors import Refusal

#: By variable: the values under which the library repeats itself, the first of them megarl's. As Megatron-LM's
#: `--deterministic-mode` has them.
VARIABLES: dict[str, tuple[str, ...]] = {
    # Transformer Engine: the backward pass of attention.
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": ("0",),
    # cuBLAS: workspaces of one size, so that the same algorithm is there each time.
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    # NCCL: sums go around in one order.
    "NCCL_ALGO": ("Ring",),
}


def refusals(config: RunConfig, environment: Mapping[str, str] = os.environ) -> Iterator[Refusal]:
    """What contradicts `deterministic: true`."""
    if not config.deterministic:
        return
    rollout = config.rollout
    if rollout.assignment == "drawn":
        yield _contradiction("rollout.assignment=drawn", "which replica answers a prompt depend on the replicas' speed")
    if rollout.seeded is False:
        yield _contradiction("rollout.seeded=false", "a sample depend on those that are drawn beside it")
    if rollout.environment is not None and not rollout.environment.in_order:
        yield Refusal(
            "rollout.environment.in_order=false with deterministic=true",
            "lets the engine's work depend on when replies come",
            "set rollout.environment.in_order=true, or deterministic=false",
        )
    for name, values in VARIABLES.items():
        found = environment.get(name, values[0])
        if found not in values:
            yield Refusal(
                f"{name}={found} in the environment with deterministic=true",
                f"must be {' or '.join(values)}",
                "unset it, or set deterministic=false",
            )


def _contradiction(setting: str, what: str) -> Refusal:
    return Refusal(f"{setting} with deterministic=true", f"would let {what}", "remove one of the two")


def set_variables(config: RunConfig) -> None:
    """Set the variables for this process and those that it starts; to be called before CUDA, cuBLAS or NCCL starts."""
    if config.deterministic:
        for name, values in VARIABLES.items():
            os.environ.setdefault(name, values[0])
