"""From graded groups to training sequences on the ranks that train on them.

Every rank computes the same assignment from the metadata; only tokens and the engine's log-probs
travel, once, from the rank that holds them to the ranks of the data-parallel replica that trains on them.
"""

from __future__ import annotations

from collections.abc import Sequence as Sequences
from dataclasses import dataclass, field
from math import prod

import numpy as np

from megarl.algorithms.objective import BatchTotals
from megarl.config.grid import grid_of_rank
from megarl.config.schema import RunConfig
from megarl.data.packing import balance
from megarl.parallel.bootstrap import World
from megarl.parallel.exchange import send_arrays
from megarl.records import Sequence
from megarl.train.groups import Rollouts


@dataclass(frozen=True, slots=True)
class Item:
    """One sequence to train on, as all ranks know it: sample, or target, `number` of a group.

    Tokens `start` to `end` of the response are trained; those before are context, those after do not travel.
    """

    group: int
    number: int
    holder: int
    start: int
    end: int
    target: bool = False
    advantage: float = 0.0
    signals: dict[str, float] = field(default_factory=dict)

    @property
    def trained(self) -> int:
        """Number of tokens trained."""
        return self.end - self.start


@dataclass(slots=True)
class MiniBatch:
    """The items of one optimizer update by data-parallel rank, and the counts of the whole."""

    items: list[list[Item]]
    totals: BatchTotals


def assign(
    rollouts: Rollouts, items: dict[int, list[Item]], updates: int, data_parallel: int, *, together: bool
) -> list[MiniBatch]:
    """Split the kept groups into `updates` mini-batches in order, each balanced over data parallelism by length.

    `items` are those of each kept group; with `together` a group's items stay on one rank. Mini-batches with fewer
    sequences (or groups, then) than data-parallel ranks cannot be trained on and are left out.
    """
    batches: list[MiniBatch] = []
    for part in np.array_split(np.array(rollouts.kept, dtype=np.int64), updates):
        groups = [int(group) for group in part]
        units = [items[group] for group in groups if items[group]]
        if not together:
            units = [[item] for unit in units for item in unit]
        if len(units) < data_parallel:
            rollouts.count("updates_without_data")
            continue
        lengths = [sum(_length(rollouts, item) for item in unit) for unit in units]
        shares = balance(lengths, data_parallel)
        placed = [[item for position in share for item in units[position]] for share in shares]
        batches.append(MiniBatch(placed, _totals(rollouts, groups, [item for unit in units for item in unit])))
    return batches


#: Sparse layers and experts per token of a recorded routing; None: there is none.
Routing = tuple[int, int] | None


def deliver(
    rollouts: Rollouts, batches: Sequences[MiniBatch], config: RunConfig, world: World, routing: Routing = None
) -> list[list[Sequence]]:
    """Send tokens to where they train; returns this rank's sequences, one list per mini-batch. Collective.

    With `routing` the engine's experts travel too.
    """
    wanted_by_rank = [_items_of(rank, batches, config, world) for rank in range(world.size)]
    outgoing = [
        _pack(rollouts, [item for item in wanted if item.holder == world.rank], routing) for wanted in wanted_by_rank
    ]
    by_holder: list[list[Item]] = [[] for _ in range(world.size)]
    for item in wanted_by_rank[world.rank]:
        by_holder[item.holder].append(item)
    received = send_arrays(outgoing, [sum(_sent(rollouts, item, routing) for item in held) for held in by_holder])
    made: dict[int, Sequence] = {}
    for held, array in zip(by_holder, received, strict=True):
        start = 0
        for item in held:
            size = _sent(rollouts, item, routing)
            made[id(item)] = _sequence(rollouts, item, array[start : start + size], routing)
            start += size
    data_rank = grid_of_rank(world.rank, world.size, config.parallel).data_rank
    return [[made[id(item)] for item in batch.items[data_rank]] for batch in batches]


def _length(rollouts: Rollouts, item: Item) -> int:
    return len(rollouts.prompts[item.group].token_ids) + item.end


def _totals(rollouts: Rollouts, groups: list[int], items: list[Item]) -> BatchTotals:
    samples = [item for item in items if not item.target]
    targets = [item for item in items if item.target]
    return BatchTotals(
        tokens=float(sum(item.trained for item in samples)),
        sequences=float(len(samples)),
        response_tokens=float(sum(score.length for group in groups for score in rollouts.scores_of(group))),
        target_tokens=float(sum(item.trained for item in targets)),
        target_sequences=float(len(targets)),
    )


def _items_of(rank: int, batches: Sequences[MiniBatch], config: RunConfig, world: World) -> list[Item]:
    data_rank = grid_of_rank(rank, world.size, config.parallel).data_rank
    return [item for batch in batches for item in batch.items[data_rank]]


def _routed_shape(rollouts: Rollouts, item: Item, routing: Routing) -> tuple[int, int, int]:
    """Of the routing that travels with an item: all its tokens but the last, which no token follows."""
    if routing is None or item.target:
        return 0, 0, 0
    return _length(rollouts, item) - 1, *routing


def _sent(rollouts: Rollouts, item: Item, routing: Routing) -> int:
    """Numbers that travel: the tokens, and of a sample the log-probs of the trained ones and the routing, in pairs."""
    if item.target:
        return item.end
    return item.end + item.trained + -(-prod(_routed_shape(rollouts, item, routing)) // 2)


def _pack(rollouts: Rollouts, items: list[Item], routing: Routing) -> np.ndarray:
    """Tokens, then log-probs bit for bit, then the routing, of each item in turn, as int32."""
    parts: list[np.ndarray] = []
    for item in items:
        if item.target:
            parts.append(np.array(rollouts.my_targets[item.group, item.number], np.int32))
            continue
        sample = rollouts.mine[item.group * rollouts.group_size + item.number]
        parts.append(np.array(sample.token_ids[: item.end], np.int32))
        parts.append(np.array(sample.rollout_log_probs[item.start : item.end], np.float32).view(np.int32))
        shape = _routed_shape(rollouts, item, routing)
        pairs = np.full(prod(shape) + prod(shape) % 2, -1, np.int16)
        if sample.routed_experts is not None:
            known = sample.routed_experts[: shape[0]].reshape(-1)
            pairs[: len(known)] = known
        parts.append(pairs.view(np.int32))
    return np.concatenate(parts) if parts else np.empty(0, np.int32)


def _sequence(rollouts: Rollouts, item: Item, payload: np.ndarray, routing: Routing) -> Sequence:
    prompt = np.array(rollouts.prompts[item.group].token_ids, np.int32)
    tokens, log_probs, pairs = np.split(payload, [item.end, item.end + item.trained])
    shape = _routed_shape(rollouts, item, routing)
    return Sequence(
        tokens=np.concatenate([prompt, tokens]),
        prompt_length=len(prompt) + item.start,
        advantages=np.full(item.trained, np.nan if item.target else item.advantage, np.float32),
        rollout_log_probs=None if item.target else log_probs.view(np.float32).copy(),
        group=item.group,
        sample=item.number,
        target=item.target,
        signals=item.signals,
        routed_experts=pairs.view(np.int16)[: prod(shape)].reshape(shape).copy() if prod(shape) else None,
    )
