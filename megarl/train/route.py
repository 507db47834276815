"""From credited groups to training sequences on the ranks that train on them.

Every rank computes the same assignment from the metadata; only tokens and the engine's log-probs
travel, once, from the rank that holds them to the ranks of the data-parallel replica that trains on them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from collections.abc import Sequence as Sequences
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import numpy as np

from megarl.algorithms.base import Group, Trained
from megarl.algorithms.objective import BatchTotals
from megarl.config.grid import grid_of_rank
from megarl.config.schema import RunConfig
from megarl.data.packing import balance
from megarl.parallel.bootstrap import World
from megarl.parallel.exchange import send_arrays
from megarl.records import DEMONSTRATION, SOLUTION, Body, Key, Sequence, from_place


class CreditedGroup(NamedTuple):
    """A kept group, and what of it is trained."""

    group: Group
    trained: tuple[Trained, ...]


class Item(NamedTuple):
    """A sequence to train on, as all ranks know it."""

    group: Group
    trained: Trained

    @property
    def length(self) -> int:
        """Tokens of the sequence: the prompt, and the response up to the last token that is trained."""
        return self.prompt_length + self.end

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt."""
        own = self.trained.head.prompt_length
        return len(self.group.prompt.token_ids) if own is None else own

    @property
    def end(self) -> int:
        """Tokens of the response up to the last that is trained."""
        return self.trained.spans[-1].end

    @property
    def kind(self) -> str:
        """Its trajectory's."""
        return self.trained.head.key.kind

    @property
    def is_text(self) -> bool:
        """Whether it is a text to learn, which no engine wrote as it stands."""
        return self.trained.head.stretches[0].source == "text"


@dataclass(slots=True)
class MiniBatch:
    """The items of one optimizer update by data-parallel rank, and the counts of the whole."""

    items: list[list[Item]]
    totals: BatchTotals


def assign(
    credited: Sequences[CreditedGroup],
    updates: int,
    data_parallel: int,
    *,
    together: bool,
    beside: Sequences[CreditedGroup] = (),
) -> tuple[list[MiniBatch], dict[str, int]]:
    """Split the groups into `updates` mini-batches in order, each balanced over data parallelism by length.

    With `together` a group's items stay on one rank. Mini-batches with fewer sequences (or groups, then) than
    data-parallel ranks cannot be trained on; they are left out, and counted in what is returned beside the others. The
    groups `beside`, which have a pass of their own, are split and balanced by themselves.
    """
    others = np.array_split(np.arange(len(beside)), updates)
    batches: list[MiniBatch] = []
    counters: Counter[str] = Counter()
    for part, other in zip(np.array_split(np.arange(len(credited)), updates), others, strict=True):
        groups = [credited[place] for place in part]
        units = _units(groups, together=together)
        if len(units) < data_parallel:
            counters["updates_without_data"] += 1
            for one in (beside[place] for place in other):
                counters[f"{one.group.heads[0].key.kind}s_not_trained"] += 1
            continue
        more = [beside[place] for place in other]
        placed = [
            [*own, *besides]
            for own, besides in zip(
                _placed(units, data_parallel), _placed(_units(more, together=False), data_parallel), strict=True
            )
        ]
        batches.append(MiniBatch(placed, _totals([*groups, *more], [item for items in placed for item in items])))
    return batches, dict(counters)


def _units(groups: Sequences[CreditedGroup], *, together: bool) -> list[list[Item]]:
    """The items of groups, those apart that may be on different ranks."""
    units = [[Item(group, one) for one in trained] for group, trained in groups if trained]
    return units if together else [[item] for unit in units for item in unit]


def _placed(units: Sequences[list[Item]], data_parallel: int) -> list[list[Item]]:
    """The items of each data-parallel rank, which have about equally many tokens."""
    shares = balance([sum(item.length for item in unit) for unit in units], data_parallel)
    return [[item for position in share for item in units[position]] for share in shares]


#: The items of each mini-batch by data-parallel rank.
Batches = Sequences[Sequences[Sequences[Item]]]
#: Sparse layers and experts per token of a recorded routing; None: there is none.
Routing = tuple[int, int] | None


def deliver(
    bodies: Mapping[Key, Body],
    batches: Batches,
    config: RunConfig,
    world: World,
    routing: Routing = None,
    version: int | None = None,
) -> list[list[Sequence]]:
    """Send tokens to where they train; returns this rank's sequences, one list per mini-batch. Collective.

    `bodies` are those that this rank holds. With `routing` the engine's experts travel too. `version` is that of the
    policy's weights as they are.
    """
    wanted_by_rank = [_items_of(rank, batches, config, world) for rank in range(world.size)]
    outgoing = [
        _pack(bodies, [item for item in wanted if item.trained.head.holder == world.rank], routing)
        for wanted in wanted_by_rank
    ]
    by_holder: list[list[Item]] = [[] for _ in range(world.size)]
    made: dict[Key, Sequence] = {}
    temperature = config.rollout.temperature
    for item in wanted_by_rank[world.rank]:
        holder = item.trained.head.holder
        if holder is None:
            made[item.trained.head.key] = _sequence(item, _pack(bodies, [item], routing), routing, temperature)
        else:
            by_holder[holder].append(item)
    received = send_arrays(outgoing, [sum(_sent(item, routing) for item in held) for held in by_holder])
    for held, array in zip(by_holder, received, strict=True):
        start = 0
        for item in held:
            size = _sent(item, routing)
            made[item.trained.head.key] = _sequence(item, array[start : start + size], routing, temperature)
            start += size
    for item in wanted_by_rank[world.rank]:
        made[item.trained.head.key].old_wrote = version is not None and old_wrote(item.trained, version)
    data_rank = grid_of_rank(world.rank, world.size, config.parallel).data_rank
    return [[made[item.trained.head.key] for item in batch[data_rank]] for batch in batches]


def old_wrote(trained: Trained, version: int) -> bool:
    """Whether the weights of the old log-probs wrote all that is trained of a trajectory: the policy's weights
    `version`, or those of an earlier step, where these log-probs are known."""
    return all(
        stretch.source == "policy" and (stretch.version == version or stretch.end <= trained.head.old_known)
        for stretch in trained.head.stretches
        if any(span.start < stretch.end and stretch.start < span.end for span in trained.spans)
    )


def _totals(groups: Sequences[CreditedGroup], items: Sequences[Item]) -> BatchTotals:
    heads = [head for group, _ in groups for head in group.heads]
    return BatchTotals.of(
        {
            kind: BatchTotals(
                tokens=float(sum(item.trained.tokens for item in items if item.kind == kind)),
                sequences=float(sum(item.kind == kind for item in items)),
                response_tokens=float(sum(head.length for head in heads if head.key.kind == kind)),
            )
            for kind in dict.fromkeys(head.key.kind for head in heads)
        }
    )


def _items_of(rank: int, batches: Batches, config: RunConfig, world: World) -> list[Item]:
    data_rank = grid_of_rank(rank, world.size, config.parallel).data_rank
    return [item for batch in batches for item in batch[data_rank]]


def _routed_shape(item: Item, routing: Routing) -> tuple[int, int, int]:
    """Of the routing that travels with an item: all its tokens but the last, which no token follows."""
    if routing is None or item.is_text:
        return 0, 0, 0
    return item.length - 1, *routing


def _sent(item: Item, routing: Routing) -> int:
    """Numbers that travel: the tokens, and of a sample the prompt's where it is not the data's, the log-probs of the
    trained ones, those that an earlier step has measured, and the routing, in pairs."""
    if item.is_text:
        return item.end
    values = item.trained.tokens + _old_known(item)
    return _own_prompt(item) + item.end + values + -(-prod(_routed_shape(item, routing)) // 2)


def _own_prompt(item: Item) -> int:
    """Tokens of a prompt that is not the data's; 0 where it is."""
    return item.trained.head.prompt_length or 0


def _old_known(item: Item) -> int:
    """Trained tokens whose old log-probs are known, which are the first of them."""
    known = item.trained.head.old_known
    return sum(max(min(span.end, known) - span.start, 0) for span in item.trained.spans)


def _pack(bodies: Mapping[Key, Body], items: Sequences[Item], routing: Routing) -> np.ndarray:
    """Tokens, first those of a prompt of their own; then the engine's log-probs and the old ones bit for bit, then the
    routing, of each item in turn, as int32."""
    parts: list[np.ndarray] = []
    for item in items:
        body = bodies[item.trained.head.key]
        parts.append(np.array([*(body.prompt_ids or ()), *body.token_ids[: item.end]], np.int32))
        if item.is_text:
            continue
        for values in (body.log_probs, body.old_log_probs):
            trained = [one for span in item.trained.spans for one in values[span.start : span.end]]
            parts.append(np.array(trained, np.float32).view(np.int32))
        shape = _routed_shape(item, routing)
        pairs = np.full(prod(shape) + prod(shape) % 2, -1, np.int16)
        if body.routed_experts is not None:
            known = body.routed_experts[: shape[0]].reshape(-1)
            pairs[: len(known)] = known
        parts.append(pairs.view(np.int32))
    return np.concatenate(parts) if parts else np.empty(0, np.int32)


def _sequence(item: Item, payload: np.ndarray, routing: Routing, temperature: float) -> Sequence:
    """`temperature` is that at which the engine sampled, and of what is learned beside its samples; worked solutions
    were not sampled, and their likelihood is that of the plain distribution."""
    spans, before, own = item.trained.spans, item.prompt_length, _own_prompt(item)
    prompt = np.array([] if own else item.group.prompt.token_ids, np.int32)
    advantages = np.concatenate([np.full(one.end - one.start, one.advantage, np.float32) for one in spans])
    sent = own + item.end
    made, known = (0, 0) if item.is_text else (item.trained.tokens, _old_known(item))
    tokens, log_probs, measured, pairs = np.split(payload, np.cumsum([sent, made, known]))
    old = np.full(made, np.nan, np.float32)
    old[:known] = measured.view(np.float32)
    shape = _routed_shape(item, routing)
    return Sequence(
        tokens=np.concatenate([prompt, tokens]),
        positions=np.concatenate([from_place(before + one.start, before + one.end) for one in spans]),
        advantages=None if np.isnan(advantages).any() else advantages,
        rollout_log_probs=None if item.is_text else log_probs.view(np.float32).copy(),
        old_log_probs=old if known else None,
        group=item.group.number,
        kind=item.kind,
        temperature=1.0 if item.kind in (SOLUTION, DEMONSTRATION) else temperature,
        signals=dict(item.trained.signals),
        routed_experts=pairs.view(np.int16)[: prod(shape)].reshape(shape).copy() if prod(shape) else None,
    )
