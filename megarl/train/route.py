"""From graded groups to training sequences on the ranks that train on them.

Every rank computes the same assignment from the metadata; only tokens and the engine's log-probs
travel, once, from the rank that holds a sample to the ranks of the data-parallel replica that trains on it.
"""

from __future__ import annotations

import numpy as np

from megarl.config.schema import RunConfig
from megarl.data.packing import balance
from megarl.parallel.bootstrap import World
from megarl.parallel.exchange import send_arrays
from megarl.parallel.groups import grid_of_rank
from megarl.records import Sequence
from megarl.train.rollouts import Rollouts

#: One mini-batch: for each data-parallel rank, the requests it trains on.
Assignment = list[list[int]]


def assign(rollouts: Rollouts, updates: int, data_parallel: int) -> list[Assignment]:
    """Split the kept groups into `updates` mini-batches in order, each balanced over data parallelism by length.

    Mini-batches with fewer sequences than data-parallel ranks cannot be trained on and are left out.
    """
    assignments: list[Assignment] = []
    for groups in np.array_split(np.array(rollouts.kept, dtype=np.int64), updates):
        requests = [int(g) * rollouts.group_size + k for g in groups for k in range(rollouts.group_size)]
        if len(requests) < data_parallel:
            rollouts.count("updates_without_data")
            continue
        lengths = [
            len(rollouts.prompts[r // rollouts.group_size].token_ids) + rollouts.scores[r].length for r in requests
        ]
        assignments.append([[requests[i] for i in part] for part in balance(lengths, data_parallel)])
    return assignments


def deliver(
    rollouts: Rollouts, assignments: list[Assignment], advantages: dict[int, float], config: RunConfig, world: World
) -> list[list[Sequence]]:
    """Send tokens to where they train; returns this rank's sequences, one list per mini-batch. Collective."""
    wanted_by_rank = [_requests_of(rank, assignments, config, world) for rank in range(world.size)]
    outgoing = [
        _pack([rollouts.mine[r] for r in wanted if rollouts.scores[r].holder == world.rank])
        for wanted in wanted_by_rank
    ]
    mine = wanted_by_rank[world.rank]
    by_holder: list[list[int]] = [[] for _ in range(world.size)]
    for request in mine:
        by_holder[rollouts.scores[request].holder].append(request)
    sizes = [2 * sum(rollouts.scores[r].length for r in held) for held in by_holder]
    received = send_arrays(outgoing, sizes)
    made: dict[int, Sequence] = {}
    for held, array in zip(by_holder, received, strict=True):
        start = 0
        for request in held:
            length = rollouts.scores[request].length
            tokens, log_probs = array[start : start + length], array[start + length : start + 2 * length]
            made[request] = _sequence(rollouts, request, tokens, log_probs.view(np.float32), advantages[request])
            start += 2 * length
    data_rank = grid_of_rank(world.rank, world.size, config.parallel)[1]
    return [[made[request] for request in assignment[data_rank]] for assignment in assignments]


def _requests_of(rank: int, assignments: list[Assignment], config: RunConfig, world: World) -> list[int]:
    data_rank = grid_of_rank(rank, world.size, config.parallel)[1]
    return [request for assignment in assignments for request in assignment[data_rank]]


def _pack(samples: list) -> np.ndarray:
    """Tokens, then log-probs bit for bit, of each sample in turn, as int32."""
    parts: list[np.ndarray] = []
    for sample in samples:
        parts.append(np.array(sample.token_ids, np.int32))
        parts.append(np.array(sample.rollout_log_probs, np.float32).view(np.int32))
    return np.concatenate(parts) if parts else np.empty(0, np.int32)


def _sequence(
    rollouts: Rollouts, request: int, tokens: np.ndarray, log_probs: np.ndarray, advantage: float
) -> Sequence:
    prompt = rollouts.prompts[request // rollouts.group_size]
    return Sequence(
        tokens=np.concatenate([np.array(prompt.token_ids, np.int32), tokens]),
        prompt_length=len(prompt.token_ids),
        advantages=np.full(len(tokens), advantage, np.float32),
        rollout_log_probs=log_probs.copy(),
        group=request // rollouts.group_size,
        sample=request % rollouts.group_size,
    )
